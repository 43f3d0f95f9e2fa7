"""DINOv3, and as configurations of it DINOv2 and iBOT: see `objective`."""
