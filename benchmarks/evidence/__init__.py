"""Parts of the benchmark that asks which layers help a student; see `benchmarks.ranking_power`.

networks, material, teachers: what is trained on what. moments, students: one student on one layer.
scores, rules: what a layer is chosen by. journal, jobs: finished work, and what is left of it.
found, report, picture: what came out.
"""
