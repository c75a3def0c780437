"""Parts of the benchmarks that ask which layers help a student: `benchmarks.ranking_power`, of one
layer, and `benchmarks.distillation`, of sets.

networks, material, teachers: what is trained on what. moments, students: one student on one layer.
scores, rules: what a layer is chosen by. journal, jobs, command: finished work, and what is left.
found, verdict, report: what came out. choices, objectives, sets, sets_found, sets_report: the same
for students on several layers.
"""
