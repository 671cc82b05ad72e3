"""The scripts, in Lua, by which the store changes a Redis.

Those that set something free also run when memory has run out, and so do those that read several
things at one moment, which a transaction would not.
"""

from collections.abc import Mapping

HEAD = """#!lua
"""
FREEING_HEAD = """#!lua flags=allow-oom
"""
READING_HEAD = """#!lua flags=no-writes
"""
COMMON = """
local call, P = redis.call, 'lorry:'
local function now_ms()
  local time = call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end
local function release_chunk(digest)
  if call('HINCRBY', P .. 'chunks', digest, -1) <= 0 then
    call('HDEL', P .. 'chunks', digest)
    call('UNLINK', P .. 'chunk:' .. digest, P .. 'quarantine:' .. digest)
  end
end
local function hold_content(digest)
  call('HINCRBY', P .. 'contents', digest, 1)
  call('ZREM', P .. 'unreferenced', digest)
end
local function release_content(digest)
  if call('HINCRBY', P .. 'contents', digest, -1) <= 0 then
    call('HSET', P .. 'contents', digest, 0)
    call('ZADD', P .. 'unreferenced', now_ms(), digest)
  end
end
local function release_chunks(list)
  for _, digest in ipairs(call('LRANGE', list, 0, -1)) do release_chunk(digest) end
  call('UNLINK', list)
end
local function add_chunk(upload, digest)
  call('HINCRBY', P .. 'chunks', digest, 1)
  call('UNLINK', P .. 'quarantine:' .. digest)
  call('RPUSH', upload .. ':chunks', digest)
end
local function moved_on(key, received)
  call('HSET', P .. 'upload:' .. key, 'received', received)
  call('ZADD', P .. 'active', now_ms(), key)
end
local function drop_upload(key)
  local upload = P .. 'upload:' .. key
  local fields = call('HMGET', upload, 'tenant', 'content')
  if not fields[1] then return end
  release_chunks(upload .. ':chunks')
  if fields[2] then release_content(fields[2]) end
  call('UNLINK', upload, upload .. ':tail')
  call('SREM', P .. 'uploads:' .. fields[1], key)
  call('ZREM', P .. 'active', key)
end
"""

# Identity of the store, made if need be: model digest (empty: it is not made), store id, format.
OPEN = """
local store = P .. 'store'
if ARGV[1] ~= '' and call('EXISTS', store) == 0 then
  call('HSET', store, 'model_digest', ARGV[1], 'store_id', ARGV[2], 'format', ARGV[3])
end
return call('HMGET', store, 'model_digest', 'store_id', 'format')
"""

# A history other than the one known: its revisions are those of another store id. Old id, new id.
RENAME_STORE = """
local store = P .. 'store'
if call('HGET', store, 'store_id') == ARGV[1] then call('HSET', store, 'store_id', ARGV[2]) end
"""

# Commit id, name, etag before, adapter after (empty: deleted), contents gained and lost, changes
# kept. Returns the revision, -1 if the etag is another, -2 if a content is missing.
COMMIT = """
local id, name, etag, adapter = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local known = call('GET', P .. 'commit:' .. id)
if known then return tonumber(known) end
local current = call('HGET', P .. 'adapters', name)
if (current and cjson.decode(current).etag or '') ~= etag then return -1 end
local gained, lost = cjson.decode(ARGV[5]), cjson.decode(ARGV[6])
for _, digest in ipairs(gained) do
  if call('EXISTS', P .. 'content:' .. digest) == 0 then return -2 end
end
local revision = call('INCR', P .. 'revision')
local text = string.format('%.0f', revision)
if adapter == '' then
  call('HDEL', P .. 'adapters', name)
else
  call('HSET', P .. 'adapters', name, adapter)
end
for _, digest in ipairs(gained) do hold_content(digest) end
for _, digest in ipairs(lost) do release_content(digest) end
call('XADD', P .. 'events', 'MAXLEN', '~', ARGV[7], text .. '-0',
  'name', name, 'adapter', adapter, 'commit', id)
call('SET', P .. 'commit:' .. id, text, 'EX', 600)
return revision
"""

# The store id, the newest revision, and changes from a revision on: revision, most of them.
CHANGES = """
return {call('HGET', P .. 'store', 'store_id') or '', call('GET', P .. 'revision') or '0',
  call('XRANGE', P .. 'events', ARGV[1] .. '-0', '+', 'COUNT', ARGV[2])}
"""

# A tenant's number of uploads ever begun, and the keys of those under way.
UPLOADS_OF = """
return {call('HGET', P .. 'begun', ARGV[1]) or '0', call('SMEMBERS', P .. 'uploads:' .. ARGV[1])}
"""

# Of an upload: record, bytes received, milliseconds since it was moved on.
FIND_UPLOAD = """
local fields = call('HMGET', P .. 'upload:' .. ARGV[1], 'record', 'received')
if not fields[1] then return nil end
return {fields[1], fields[2], now_ms() - (call('ZSCORE', P .. 'active', ARGV[1]) or 0)}
"""

# Of an upload: the digests of its chunks, and its tail.
STAGED = """
local upload = P .. 'upload:' .. ARGV[1]
return {call('LRANGE', upload .. ':chunks', 0, -1), call('GET', upload .. ':tail') or ''}
"""

# Key, tenant, record, number of uploads that the tenant has begun as far as the store knows.
CREATE_UPLOAD = """
local key, tenant = ARGV[1], ARGV[2]
local upload = P .. 'upload:' .. key
if call('EXISTS', upload) == 1 then return 1 end
if (call('HGET', P .. 'begun', tenant) or '0') ~= ARGV[4] then return 0 end
call('HINCRBY', P .. 'begun', tenant, 1)
call('HSET', upload, 'record', ARGV[3], 'tenant', tenant)
call('SADD', P .. 'uploads:' .. tenant, key)
moved_on(key, 0)
return 1
"""

# Key, offset, bytes, their digest if they are a whole chunk, bytes of a whole chunk. Returns the
# bytes received so far, -1 if there is no such upload, -2 if its tail must be sealed first.
APPEND = """
local key, offset, data, digest = ARGV[1], tonumber(ARGV[2]), ARGV[3], ARGV[4]
local upload = P .. 'upload:' .. key
local received = tonumber(call('HGET', upload, 'received') or '-1')
if received ~= offset then return received end
if call('STRLEN', upload .. ':tail') >= tonumber(ARGV[5]) then return -2 end
if digest ~= '' then
  call('SET', P .. 'chunk:' .. digest, data)
  add_chunk(upload, digest)
else
  call('APPEND', upload .. ':tail', data)
end
moved_on(key, received + #data)
return received + #data
"""

# Make the tail a chunk if it is still what was hashed, for a tail only grows: key, number of chunks
# before it, digest, bytes.
SEAL = """
local upload, digest = P .. 'upload:' .. ARGV[1], ARGV[3]
local tail = upload .. ':tail'
local same = call('LLEN', upload .. ':chunks') == tonumber(ARGV[2])
  and call('STRLEN', tail) == tonumber(ARGV[4])
if same then
  call('RENAME', tail, P .. 'chunk:' .. digest)
  add_chunk(upload, digest)
end
"""

# Make an upload's chunks those of a content, whether or not it is there: key, digest, spec, crc32c,
# bytes. The steps are the same: their time would tell what other tenants have.
KEEP = """
local key, digest = ARGV[1], ARGV[2]
local upload, content = P .. 'upload:' .. key, P .. 'content:' .. digest
if call('EXISTS', upload) == 0 then return 0 end
for _, chunk in ipairs(call('LRANGE', upload .. ':chunks', 0, -1)) do
  call('HINCRBY', P .. 'chunks', chunk, 1)
end
release_chunks(content .. ':chunks')
call('COPY', upload .. ':chunks', content .. ':chunks', 'REPLACE')
call('HSET', content, 'spec', ARGV[3], 'crc32c', ARGV[4], 'bytes', ARGV[5])
local before = call('HGET', upload, 'content')
if before ~= digest then
  hold_content(digest)
  call('HSET', upload, 'content', digest)
  if before then release_content(before) end
end
moved_on(key, call('HGET', upload, 'received'))
return 1
"""

DROP_UPLOAD = "drop_upload(ARGV[1])"

# Milliseconds of idleness, then the keys of uploads that are not idle. Returns what was dropped.
DROP_EXPIRED = """
for i = 2, #ARGV do call('ZADD', P .. 'active', 'XX', now_ms(), ARGV[i]) end
local last = string.format('%.0f', now_ms() - ARGV[1])
local expired = call('ZRANGE', P .. 'active', '-inf', last, 'BYSCORE', 'LIMIT', 0, 100)
for _, key in ipairs(expired) do
  drop_upload(key)
  call('ZREM', P .. 'active', key)
end
return expired
"""

# A content that is about to be read: digest, milliseconds of the lease.
READ_CONTENT = """
local content = P .. 'content:' .. ARGV[1]
if call('EXISTS', content) == 0 then return nil end
call('SET', P .. 'lease:' .. ARGV[1], '', 'PX', ARGV[2])
local fields = call('HMGET', content, 'spec', 'crc32c', 'bytes')
return {fields[1], fields[2], fields[3], call('LRANGE', content .. ':chunks', 0, -1)}
"""

# Milliseconds, then the digests.
LEASE = """
for i = 2, #ARGV do call('SET', P .. 'lease:' .. ARGV[i], '', 'PX', ARGV[1]) end
"""

# Contents that were unreferenced for so many milliseconds and are handed out by nobody.
UNREFERENCED = """
local last = string.format('%.0f', now_ms() - ARGV[1])
local found = {}
for _, digest in ipairs(
    call('ZRANGE', P .. 'unreferenced', '-inf', last, 'BYSCORE', 'LIMIT', 0, 1000)) do
  if call('EXISTS', P .. 'lease:' .. digest) == 0 then found[#found + 1] = digest end
end
return found
"""

DROP_CONTENT = """
local digest = ARGV[1]
local content = P .. 'content:' .. digest
if tonumber(call('HGET', P .. 'contents', digest) or '0') > 0 then return end
if call('EXISTS', P .. 'lease:' .. digest) == 1 then return end
release_chunks(content .. ':chunks')
call('UNLINK', content)
call('HDEL', P .. 'contents', digest)
call('ZREM', P .. 'unreferenced', digest)
"""

# Put a chunk aside unless it was replaced since it was read: digest, SHA-1 of what was read.
QUARANTINE = """
local chunk = P .. 'chunk:' .. ARGV[1]
local data = call('GET', chunk)
if data and redis.sha1hex(data) == ARGV[2] then
  call('RENAME', chunk, P .. 'quarantine:' .. ARGV[1])
end
"""

# Put a chunk back of which there is another copy: digest, bytes. Only if something refers to it.
REPAIR = """
if call('HEXISTS', P .. 'chunks', ARGV[1]) == 0 then return 0 end
call('SET', P .. 'chunk:' .. ARGV[1], ARGV[2])
call('UNLINK', P .. 'quarantine:' .. ARGV[1])
return 1
"""

SCRIPTS: Mapping[str, str] = {
    "open": HEAD + COMMON + OPEN,
    "rename_store": FREEING_HEAD + COMMON + RENAME_STORE,
    "commit": HEAD + COMMON + COMMIT,
    "delete": FREEING_HEAD + COMMON + COMMIT,
    "changes": READING_HEAD + COMMON + CHANGES,
    "uploads_of": READING_HEAD + COMMON + UPLOADS_OF,
    "find_upload": READING_HEAD + COMMON + FIND_UPLOAD,
    "staged": READING_HEAD + COMMON + STAGED,
    "create_upload": HEAD + COMMON + CREATE_UPLOAD,
    "append": HEAD + COMMON + APPEND,
    "seal": FREEING_HEAD + COMMON + SEAL,
    "keep": HEAD + COMMON + KEEP,
    "drop_upload": FREEING_HEAD + COMMON + DROP_UPLOAD,
    "drop_expired": FREEING_HEAD + COMMON + DROP_EXPIRED,
    "read_content": FREEING_HEAD + COMMON + READ_CONTENT,
    "lease": FREEING_HEAD + COMMON + LEASE,
    "unreferenced": READING_HEAD + COMMON + UNREFERENCED,
    "drop_content": FREEING_HEAD + COMMON + DROP_CONTENT,
    "quarantine": FREEING_HEAD + COMMON + QUARANTINE,
    "repair": HEAD + COMMON + REPAIR,
}
