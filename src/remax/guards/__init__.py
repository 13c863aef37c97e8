"""What keeps a run from harm, and says so.

memory.py   out of memory: the same work again in smaller pieces
finite.py   a loss or gradient that is not finite: the update is skipped, and its batch kept
alarms.py   figures that tell of a run gone wrong
watch.py    the three of them beside a training: what is recorded, what is said, what is saved
dumps.py    what a skipped update leaves behind
replay.py   `remax replay`: that update again, row by row
"""
