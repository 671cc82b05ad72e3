"""The ``redis://`` backend, which several stores may share.

All keys begin with ``lorry:``. Every change is one script, so it is done whole or not at all, and
one that is repeated because its answer was lost does nothing the second time.

store                 hash of format, store_id and model_digest
revision              number of the newest change
adapters              hash of adapters in JSON by name, TENANT/ADAPTER
events                stream of the last changes; an entry's id is its revision
commit:ID             revision of a commit, for a while
begun                 hash of the number of uploads that each tenant has begun
active                sorted set of uploads by when they were last moved on
uploads:TENANT        set of a tenant's uploads
upload:KEY            hash of record, received (bytes), tenant and content (that it has become)
upload:KEY:chunks     list of the digests of its chunks
upload:KEY:tail       bytes after its last whole chunk
contents              hash of the number of names and uploads that refer to each content
unreferenced          sorted set of contents without any, by since when
lease:DIGEST          there while a store hands out the content
content:DIGEST        hash of spec, crc32c and bytes of the safetensors file
content:DIGEST:chunks list of the digests of its chunks
chunks                hash of the number of contents and uploads that refer to each chunk
chunk:SHA256          up to 1 MiB of safetensors files
quarantine:SHA256     what a chunk was found damaged as

A chunk always has an owner, from the step that stores it: so nothing needs to search for garbage,
and nothing can take a chunk that an upload has sent. Times are those of Redis.
"""
