"""Constants of the protocol between services that are in no message."""

# What Hello and Welcome of WorkerService.Attach carry: raised when one side could misread the other.
PROTOCOL_REVISION = 1
