"""A discrete-event simulator: the router's own policies on a virtual clock, over modelled workers.

`clock` orders events, `worker` steps an engine whose step is one event and costs what `costs` says,
`router` drives `lorry.router.dispatcher`, and `run` puts a trace through all of it.
"""
