"""The load generator of `lorry bench`: traces, open-loop requests, and what was seen of them."""
