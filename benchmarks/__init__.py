"""Timings of kmm: one call, one mechanism, a whole machine."""
