"""Pages of a report for the tests: scores and names that a page must cope with, and a reader."""

import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
from scored import SETTINGS
from small import blobs, run_mlp

from geomkd import LayerScores
from geomkd.measures.table import NAMES, columns_of
from geomkd.scoring.settings import Settings

NASTY = '<script>alert("x")</script> & $x_1$ $title \'"'
VOID = {"meta", "link", "wbr", "br", "input", "img", "hr"}


def scored(names, measures=("knowledge_quality",), draws=20, **settings):
    """Scores of layers of these names by the measures, with half-samples, made up."""
    rng, n = np.random.default_rng(0), len(names)
    columns = columns_of(measures)
    frame = pd.DataFrame({"layer": names, "depth": range(n), "kind": "map", "role": "block"})
    frame["shape"] = [(8, 4, 4)] * n
    frame = frame.assign(n=60, dim=128, **{c: rng.uniform(0.1, 3, n) for c in columns})
    drawn = {c: frame[c].to_numpy()[:, None] + rng.normal(0, 0.1, (n, draws)) for c in columns}
    given = {"measures": list(measures), "subsamples": draws, "samples_per_class": [30, 30]}
    return LayerScores(frame, drawn, Settings.of(SETTINGS | given | settings))


def many():
    """Scores of 18 layers, named as resnet34's, by every measure."""
    names = [f"layer{i}.{j}" for i, n in enumerate((3, 4, 6, 3), 1) for j in range(n)]
    return scored(["relu", *names, "fc.input"], NAMES, 50)


def trained(**options):
    """A distillation of a few steps."""
    return run_mlp(val=blobs(20), epochs=3, **options)


class Read(HTMLParser):
    """What is in a page: elements as (tag, attributes, text within); raises where it is amiss."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements = [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), (tag, attrs)
        element = [tag, dict(attrs), ""]
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.elements.append([tag, dict(attrs), ""])

    def handle_endtag(self, tag):
        assert self.open and self.open[-1][0] == tag, (tag, [e[0] for e in self.open])
        self.open.pop()

    def handle_data(self, data):
        for element in self.open:
            element[2] += data

    def all(self, tag, **attributes):
        """Elements of a tag that have these attributes."""
        return [e for e in self.elements if e[0] == tag and attributes.items() <= e[1].items()]

    def texts(self, tag, **attributes):
        return [re.sub(r"\s+", " ", e[2]).strip() for e in self.all(tag, **attributes)]
