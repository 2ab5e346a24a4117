"""The models of a run, for notebooks that let them compute. Importing this loads torch."""

from ragkit.experiment.graph import Of
from ragkit.experiment.lab import Lab
from ragkit.models import device
from ragkit.models.fid import open_reader
from ragkit.models.index import Index
from ragkit.models.reader import Reader
from ragkit.models.retriever import Retriever


def reader(lab: Lab, set_name: str, which: str) -> Reader:
    """One of `lab.readers()`, as the stages open it that look through it."""
    stage = lab.graph.stage("alone", Of(set_name, which))
    inputs = {role: lab.open_stage(one) for role, one in stage.inputs.items()}
    device.start(lab.profile.device, lab.profile.threads)
    return open_reader(inputs, stage.settings)


def retriever(lab: Lab, set_name: str) -> Retriever:
    """The initial retriever."""
    folder = lab.open("retriever", set_name) / "model"
    device.start(lab.profile.device, lab.profile.threads)
    return Retriever.load(str(folder), lab.profile.retriever)


def vectors(lab: Lab, set_name: str) -> Index:
    """The initial retriever's vectors of all passages."""
    return Index.open(lab.open("vectors", set_name))
