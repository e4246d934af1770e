"""Files of torch.save, read without PyTorch; nothing in them is executed.

archive.py  the zip file: one pickle, one record per storage
pickle.py   interprets the pickle on its own stack
objects.py  the objects that it builds; unknown ones stay inert
budget.py   limits memory and time in proportion to the file's size
"""
