"""A checkpoint's backbone in the form that another program loads: `export.py` is the front door, one file per form."""
