"""Which set of layers, which objective, what weight of the features? Four teachers, three seeds.

    python benchmarks/distillation.py --data FOLDER --processes 2    # hours; goes on where it was
    python benchmarks/distillation.py --data FOLDER --parts choices --teachers cifar10-resnet20
    python benchmarks/distillation.py --list
    python benchmarks/distillation.py --report
    python benchmarks/distillation.py --quick                        # generated images, seconds

The protocol, committed before the first run
--------------------------------------------
- Teachers: of those of `ranking_power`, the published ResNet-20 and the own fitted ResNet (CIFAR-10
  images), and the own ResNets on Tiny ImageNet and Fashion-MNIST; as there, with the weights in
  ``--ranking``. One whose weights are not there waits; the last two wait for the rule too.
- Students: those of `ranking_power`, the same network, images, epochs, batches, rate and seeds
  0, 1, 2; measured on the same test images after the last epoch: the head that trained along, by
  which tables go, and a logistic regression refitted on the frozen backbone. A run whose loss
  becomes NaN is right on no image.
- Pairs: four. Layer i of k learns with student block round((i + 1) m / k) of m; of a student of
  three blocks, the second learns from two layers. Sets with fewer layers have as many pairs.
- Part ``choices``: the objective ``features`` as the library has it (mean squared error of a linear
  projection, mean over the pairs, targets as they are; cross entropy for the detached head) on
  sets of layers. By place: evenly spaced blocks; the last 4 blocks; the last block of each stage;
  the head's input alone; 4 evenly spaced among the blocks and the head's input ("anchored at the
  head's input"); 4 candidates drawn at random, 3 draws. By held-out scores: the 4 candidates of
  highest Q, published and robust; Q with redundancy (weight 0.5); LOES with its published weights.
  By the rule that went to confirmation: its 4 highest (of a rule that names one layer, that one);
  its best layer, the rest evenly spaced among the blocks below ("anchored at the rule's best").
  Sets that are equal are trained once.
- Part ``objectives``, on the evenly spaced pairs: features; with targets standardised per channel
  by statistics of the training images; CE + KD (T = 4) + w features and CE + w features, nothing
  detached, w = 1, 10, 100, 1000; fitnet, semckd, simkd, ce, kd as published; last only, normalised:
  smooth L1 from the last block, pooled and projected by an orthogonal matrix, to the teacher's last
  block, pooled and layer-normed, no logit loss on the backbone. The best w by the mean of the other
  seeds is compared with features on the one left, in turn.
- Part ``amounts``, on the published ResNet-20: 125, 500 and 1,500 images a class for ce, kd,
  features and CE + KD + w features, w the best by the mean of the seeds at 500. 8 epochs, of 125
  images 32, so that no student takes fewer steps than at 500.
- Part ``rivals``, on the evenly spaced pairs: kd_standardized, attention_transfer,
  similarity_preserving, relational as published.
- Differences come with a 90 % interval by a bootstrap over seeds and test images.
- ``--device`` says where students are trained; each line names the accelerator. TF32 is left off
  (``NVIDIA_TF32_OVERRIDE=0``).

Each finished run is a line of ``results/sets/<teacher>.jsonl``, with which test images it is right
on as packed bits in base64.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

if __package__ in (None, ""):  # run as a file, not as a module
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.evidence import command, sets_report
from benchmarks.evidence.choices import EVENLY
from benchmarks.evidence.jobs import Bench, Places
from benchmarks.evidence.objectives import COMPARED, FEATURES
from benchmarks.evidence.report import table
from benchmarks.evidence.sets import PARTS, QUICK, QUICK_COMPARED, TEACHERS, SetBench, SetPlaces
from benchmarks.evidence.sets_found import SetsFound
from geomkd.common.results_folder import write_json

HERE = Path(__file__).resolve().parent
GUESS = 60  # seconds of a run, where none is finished


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    options.parts = options.parts or list(PARTS[:-1] if options.quick else PARTS)
    wanted = command.wanted(options.teachers, QUICK if options.quick else TEACHERS)
    results = options.out or HERE / "results" / ("sets-quick" if options.quick else "sets")
    ranking = results / "ranking_power" if options.quick else options.ranking
    chosen = partial(command.chosen_rule, ranking)
    compared = QUICK_COMPARED if options.quick else COMPARED
    places = SetPlaces(
        options.data, results, options.work, chosen, options.device, ranking, compared
    )
    benches = [SetBench(teacher, places) for teacher in wanted]
    say = partial(print, flush=True)
    if options.list:
        say(listing(benches, options.parts))
        return 0
    if not options.report:
        if options.quick:
            _rank(benches, places)
        command.in_processes(__file__, benches, options.parts, options, arguments, say)
        for bench in filter(SetBench.why_waiting, benches):
            say(f"{bench.teacher.name}: {bench.why_waiting()}")
    if options.report or options.quick:
        founds = [bench.found for bench in benches]
        say(sets_report.report(founds, [_left(bench, options.parts) for bench in benches]))
        _pictures([found for found in founds if found.runs], results)
    return 0


def _rank(benches: Sequence[SetBench], places: SetPlaces) -> None:
    """Do of a quick teacher what `ranking_power` does of the others, and name a rule."""
    there = Places(places.data, places.ranking, places.work, places.chosen, places.device)
    for bench in (Bench(bench.teacher, there) for bench in benches):
        for job in [job for job in bench.open([]) if job[0] == "teacher"]:
            bench.do(job)
        for job in [job for job in bench.open([]) if job == ("scores", "held-out")]:
            bench.do(job)
    write_json(places.ranking / "chosen.json", {"rule": "silhouette"})


def _pictures(founds: Sequence[SetsFound], results: Path) -> None:
    if not founds:
        return
    shown = (("accuracy", sets_report.choices_of, EVENLY),)
    shown += (("objectives", sets_report.objectives_of, FEATURES),)
    for name, rows_of, line in shown:
        sets_report.picture(founds, rows_of, line, results / f"{name}.png")
    for found in founds:
        if sets_report.amounts_of(found):
            path = results / f"amounts-{found.teacher.name}.png"
            sets_report.amounts_picture(found, path)


def _left(bench: SetBench, parts: Sequence[str]) -> str:
    """What is open of a teacher, as the journals tell it."""
    found = bench.found
    if not found.choices:
        return "everything"
    left = len(list(bench.open(parts, waiting=True)))
    return f"{left} and the rule's" if found.rule is None else str(left)


def listing(benches: Sequence[SetBench], parts: Sequence[str]) -> str:
    """What is finished and open of each teacher, and for how long."""
    rows, total = [], 0.0
    for bench in benches:
        found, seeds = bench.found, bench.teacher.recipe.seeds
        took = [line.get("seconds", 0.0) for of in found.runs.values() for line in of.values()]
        left = [] if bench.why_waiting() else list(bench.open(parts))
        each = sum(took) / len(took) if took else GUESS
        n = seeds * sum(job[0] == "students" for job in left)
        total += each * n
        rows.append([bench.teacher.name, str(len(took)), _left(bench, parts), f"{each:.0f} s"])
        rows[-1].append(bench.why_waiting() or f"{each * n / 60:.0f} min")
    rows.append(["all", "", "", "", f"{total / 3600:.1f} h of one core"])
    head = ["teacher", "finished runs", "open jobs", "a run", "to go, as far as it is known"]
    return table(head, rows)


def _parser() -> argparse.ArgumentParser:
    parser = command.parser_of(__doc__.splitlines()[0])
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        help=f"in this order (default: {' '.join(PARTS)}; quick without the last)",
    )
    parser.add_argument(
        "--ranking",
        type=Path,
        default=HERE / "results" / "ranking_power",
        help="what ranking_power found: weights, scores, the rule (default: %(default)s)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
