"""Checkpoints: what a run needs to go on as if nothing had happened.

files.py    a folder is written completely or not at all, verified by checksum, rotated
start.py    what --resume means for a folder as it is found
changes.py  which settings differ from those the run has
lock.py     one run at a time in a folder
signals.py  Ctrl-C and SIGTERM wait for the end of a step
writer.py   writing in the background, and what happens when the disk is full
state.py    what is saved of a ReMaxTrainer, and how it is put back
run.py      a training's hold on its folder, whatever the command
session.py  all of this around ReMaxTrainer.train

The supervised stages have transformers save their state, and share the rest: see stages/saving.py.
"""
