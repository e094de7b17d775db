"""The files of a run: plain values in, plain values out."""
