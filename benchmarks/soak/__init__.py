"""Random requests and faults for a long time, at the end of which nothing may be left or wrong."""
