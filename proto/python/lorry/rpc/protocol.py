"""Constants of the protocol between services that are in no message."""

# What Hello and Welcome of an Attach stream carry: raised when a side could misread the other.
PROTOCOL_REVISION = 1

MAX_CHUNK_BYTES = 1 << 20  # of the data in a WeightChunk
