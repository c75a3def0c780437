"""Which score of a teacher's layer tells what a student gains from it? Nine teachers, every layer.

    python benchmarks/ranking_power.py --data FOLDER --processes 2   # hours; goes on where it was
    python benchmarks/ranking_power.py --list
    python benchmarks/ranking_power.py --report
    python benchmarks/ranking_power.py --quick                       # generated images, seconds

The protocol, committed before the first run
--------------------------------------------
- Teachers (`evidence.teachers`): four for discovery, on CIFAR-10 images: published ResNet-20 and
  ResNet-56 (every second block), an own VGG with flips and crops, an own ResNet without, until it
  is right on its images. Five for confirmation: ResNet, VGG and a transformer on 40 classes of Tiny
  ImageNet, ResNet and transformer on Fashion-MNIST. Own ones are trained once, seed 0; what is kept
  and measured are their weights in half precision.
- Students: for every candidate layer alone, the same network of three or four blocks of half the
  teacher's widths (a transformer of half the blocks for transformers), its last block paired;
  features alone, the head detached; targets standardised per channel on the grid where both meet,
  by statistics of the students' training images; AdamW, one cycle to 0.0075 (0.001 for
  transformers), 8 epochs in batches of 64, no augmentation; 5,000 training images, 500 a class
  (Tiny ImageNet 10,000, 250 a class), the first of each; seeds 0, 1, 2. The zero line: the same
  student by cross entropy alone.
- Measured after the last epoch: the head that trained along, and a logistic regression (C = 1,
  standardised) on the frozen backbone's last features. Tables and choices go by the first.
- Images: scores on 3,000 (2,000 of Tiny ImageNet) test images, accuracies on 7,000 (3,999) others.
- Beside the main arm: on the published ResNet-20 and the Tiny ImageNet ResNet, cross entropy +
  100 x features with nothing detached, and targets averaged over positions; on these two and the
  fitted ResNet, five evenly spaced candidates with three times the epochs.
- Scores also on as many of the training images (for the published teachers: of the archive's), by
  the paper's sampling (5,000 training images, 500 a class for the entropy), of an untrained
  teacher, and with permuted labels. The data set's size in the published efficiency is that of the
  training images throughout.
- Rules and signs: `evidence.rules`. Regret: the layer that is best by the mean of the other seeds
  less the picked layer, on one seed, in turn. Ceiling: mean Kendall's tau between seeds; a teacher
  under 0.7 is undecided: shown, but in no mean. A run whose loss becomes NaN is right on no image.
- To confirmation goes the score (no rule that knows places alone) of lowest mean regret on
  discovery (of equals, that of highest mean tau); `--choose` writes it down, and no confirmation
  student is trained before. It is recommended if its mean regret there is at least 0.5 points below
  those of both deepest block and Q at the lower end of a 90 % bootstrap interval over seeds and
  test images; else whichever of deepest block and head's input has the lower regret.

- Arms beside the main one may be trained on an accelerator (``--device``; each line names it), with
  TF32 left off. So were the last students of the two transformers of confirmation.

Each finished piece of work is a line of ``results/ranking_power/<teacher>.jsonl``; which test
images a student is right on is kept as packed bits in base64.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

if __package__ in (None, ""):  # run as a file, not as a module
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.evidence import command, jobs, report, teachers
from benchmarks.evidence.found import Found
from benchmarks.evidence.scores import IMAGES
from benchmarks.evidence.students import ARMS
from benchmarks.evidence.verdict import choose
from geomkd.common.results_folder import write_json

HERE = Path(__file__).resolve().parent
GUESS = {"teacher": 600, "scores": 120, "student": 100}  # seconds, where none is finished


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    known = teachers.QUICK if options.quick else teachers.TEACHERS
    wanted = command.wanted(options.teachers, known)
    folder = "ranking_power-quick" if options.quick else "ranking_power"
    results = options.out or HERE / "results" / folder
    chosen = partial(command.chosen_rule, results)
    places = jobs.Places(options.data, results, options.work, chosen, options.device)
    benches = [jobs.Bench(teacher, places) for teacher in wanted]
    say = partial(print, flush=True)
    if options.list:
        say(listing(benches, options.arms))
    elif options.choose:
        _choose(known, results, say)
    elif not options.report:
        _run(benches, options, arguments, say)
        if options.quick:
            _choose(known, results, say)
            _run(benches, options, arguments, say)
    if options.report or options.quick:
        founds = [Found.of(teacher, results) for teacher in wanted]
        say(report.report(founds, chosen()))
        whole = [found for found in founds if found.complete]
        if whole:
            report.picture(whole, results / "regret.png")
    return 0


def _run(
    benches: list[jobs.Bench], options: argparse.Namespace, arguments: Sequence[str] | None, say
) -> None:
    command.in_processes(__file__, benches, options.arms, options, arguments, say)
    if any(b.teacher.confirmation for b in benches) and benches[0].places.chosen() is None:
        say("confirmation students wait for the rule: --choose")


def _choose(known: list[teachers.Teacher], results: Path, say) -> None:
    path = results / "chosen.json"
    rule = command.chosen_rule(results)
    if rule is None:
        founds = [Found.of(teacher, results) for teacher in known if not teacher.confirmation]
        rule = choose(founds)
        prints = {found.teacher.name: found.about["fingerprint"] for found in founds}
        today = datetime.date.today().isoformat()
        write_json(path, {"rule": rule, "date": today, "teachers": prints})
    say(f"the rule that goes to confirmation: {rule}")


def listing(benches: list[jobs.Bench], arms: Sequence[str]) -> str:
    """What is finished and open of each teacher, and for how long."""
    rows, total = [], 0.0
    for bench in benches:
        lines, seeds = bench.journal.read(), bench.teacher.recipe.seeds
        took: dict[str, list[float]] = {}
        for line in lines:
            took.setdefault(line["kind"], []).append(line.get("seconds", 0.0))
        each = {k: sum(took[k]) / len(took[k]) if k in took else s for k, s in GUESS.items()}
        left = list(bench.open(list(arms), waiting=True))
        seconds = sum(each[job[0]] * (seeds if job[0] == "student" else 1) for job in left)
        if left == [("teacher",)]:  # its layers are not known yet: ten, and the zero line
            seconds += each["scores"] * len(IMAGES) + each["student"] * seeds * 11
        total += seconds
        done = ", ".join(f"{len(found)} {kind}" for kind, found in took.items()) or "nothing"
        rows.append([bench.teacher.name, done, str(len(left)), f"{seconds / 60:.0f} min"])
    rows.append(["all", "", "", f"{total / 3600:.1f} h of one core"])
    return report.table(["teacher", "finished", "open jobs", "to go"], rows)


def _parser() -> argparse.ArgumentParser:
    parser = command.parser_of(__doc__.splitlines()[0])
    parser.add_argument(
        "--arms",
        nargs="+",
        choices=list(ARMS),
        default=["features"],
        help="kinds of students, in this order (default: %(default)s)",
    )
    parser.add_argument("--choose", action="store_true", help="the rule that discovery gives")
    return parser


if __name__ == "__main__":
    sys.exit(main())
