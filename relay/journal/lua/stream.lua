-- What the operations that change a stream's frames share; redis_streams.py puts it before each of them.
-- A stream's meta hash caches what its Redis Stream knows. Where the two disagree the stream is right:
-- an XADD of the next cached id fails when the stream is ahead or gone, and only then is it asked.
--
-- This runs for every append. Each local function here costs a closure per call of the script, and each
-- field a conversion, so what is rarely needed is nested in what needs it.

local call = redis.call
local INDEX_STRIDE = 65536

local function clock_ms()
  local time = call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

local function load_stream(meta_key)
  local v = call('HMGET', meta_key, 'last_seq', 'last_ms', 'bytes', 'last_data', 'created', 'earliest', 'trimmed',
    'indexed', 'largest', 'renewed', 'max_frames', 'max_bytes', 'retention_ms', 'keep_from')
  if not v[1] then return nil end
  local earliest, trimmed = tonumber(v[6]), tonumber(v[7])
  return {
    last_seq = tonumber(v[1]), last_ms = tonumber(v[2]), bytes = tonumber(v[3]), last_data = tonumber(v[4]),
    created = tonumber(v[5]), earliest = earliest, trimmed = trimmed, indexed = tonumber(v[8]),
    largest = tonumber(v[9]), renewed = tonumber(v[10]), max_frames = tonumber(v[11]),
    max_bytes = tonumber(v[12]), retention_ms = tonumber(v[13]), keep_from = tonumber(v[14]),
    rarely_changed = false,
  }
end

local function save_stream(meta_key, s)
  call('HSET', meta_key, 'last_seq', s.last_seq, 'last_ms', s.last_ms, 'bytes', s.bytes, 'last_data', s.last_data)
  if s.rarely_changed then
    call('HSET', meta_key, 'created', s.created, 'earliest', s.earliest, 'trimmed', s.trimmed,
      'indexed', s.indexed, 'largest', s.largest, 'renewed', s.renewed)
  end
end

-- Append the frames of `message` {_, _, _, run, event, data, run, event, data, …}, whose first three
-- members become the previous seq and ms and the frames' own ms. Nothing is written before the first XADD
-- succeeded; when Redis refuses it, its error reply is returned.
local function add_frames(frames_key, index_key, s, now, message)
  -- Take the position from the Redis Stream itself. One that is gone begins a new life.
  local function ask_stream()
    s.rarely_changed = true
    if call('EXISTS', frames_key) == 0 then
      s.created = math.max(now, s.last_ms + 1)
      s.last_seq, s.last_ms, s.earliest, s.last_data = 0, 0, 1, 0
      s.bytes, s.trimmed, s.indexed = 0, 0, 0
      s.reborn = true
      return
    end
    local info = call('XINFO', 'STREAM', frames_key)
    for i = 1, #info, 2 do
      if info[i] == 'last-generated-id' then
        local seq, ms = string.match(info[i + 1], '^(%d+)-(%d+)$')
        s.last_seq, s.last_ms = tonumber(seq), tonumber(ms)
      end
    end
  end

  local ms = math.max(now, s.last_ms, s.created)
  local reply
  if s.last_seq > 0 then
    reply = redis.pcall('XADD', frames_key, 'NOMKSTREAM', string.format('%d-%d', s.last_seq + 1, ms),
      'r', message[4], 'e', message[5], 'd', message[6])
    if not reply or (reply.err and string.find(reply.err, 'equal or smaller', 1, true)) then
      ask_stream()
      ms = math.max(now, s.last_ms, s.created)
      reply = nil
    end
  end
  if not reply then
    reply = redis.pcall('XADD', frames_key, string.format('%d-%d', s.last_seq + 1, ms),
      'r', message[4], 'e', message[5], 'd', message[6])
  end
  if type(reply) == 'table' and reply.err then return reply end

  message[1], message[2], message[3] = s.last_seq, s.last_ms, ms
  if s.reborn then call('UNLINK', index_key) end
  local seq, bytes, largest, last_data, indexed = s.last_seq, s.bytes, s.largest, s.last_data, s.indexed
  local format, tail = string.format, string.format('-%d', ms)
  for i = 4, #message, 3 do
    local event, data = message[i + 1], message[i + 2]
    seq = seq + 1
    if i > 4 then
      -- a number that is made text by itself takes four times as long
      call('XADD', frames_key, format('%d', seq) .. tail, 'r', message[i], 'e', event, 'd', data)
    end
    local size = #data
    bytes = bytes + size
    if size > largest then largest, s.rarely_changed = size, true end
    if event ~= 'relay' then last_data = seq end
    if bytes - indexed >= INDEX_STRIDE then
      call('ZADD', index_key, bytes, seq)
      indexed, s.index_grew, s.rarely_changed = bytes, true, true
    end
  end
  s.last_data, s.indexed = last_data, indexed
  s.last_seq, s.last_ms, s.bytes, s.largest = seq, ms, bytes, largest
  return nil
end

-- Drop the shortest prefix so that no frame before `first` is held and at least `target` bytes of this
-- life of the stream are dropped; none after `limit` goes. Where `spare` frames and bytes are given, so much
-- may stay, and what the index does not tell is not read.
local function drop_prefix(frames_key, index_key, s, first, target, limit, spare_frames, spare_bytes)
  spare_frames, spare_bytes = spare_frames or 0, spare_bytes or 0
  local seq, cumulative = s.earliest - 1, s.trimmed
  if seq >= limit or (seq >= first - 1 - spare_frames and cumulative >= target - spare_bytes) then return end

  local function jump(entry)
    local to_seq = tonumber(entry[1])
    if to_seq and to_seq > seq and to_seq <= limit then seq, cumulative = to_seq, tonumber(entry[2]) end
  end

  -- The byte index entry with the greatest seq that is at most `bound`, by halving: it is sorted by seq too.
  local function indexed_at_seq(bound)
    local low, high, found = 0, call('ZCARD', index_key) - 1, {}
    while low <= high do
      local middle = math.floor((low + high) / 2)
      local entry = call('ZRANGE', index_key, middle, middle, 'WITHSCORES')
      if tonumber(entry[1]) <= bound then
        found, low = entry, middle + 1
      else
        high = middle - 1
      end
    end
    return found
  end

  if first - 1 - seq > 256 then jump(indexed_at_seq(math.min(first - 1, limit))) end
  if target - cumulative >= INDEX_STRIDE then
    jump(call('ZREVRANGEBYSCORE', index_key, target, '-inf', 'WITHSCORES', 'LIMIT', 0, 1))
  end
  first, target = first - spare_frames, target - spare_bytes
  local few = 1
  local many = math.max(8, math.min(128, math.floor(1048576 / math.max(s.largest, 1))))
  while seq < limit and (seq < first - 1 or cumulative < target) do
    -- as many as must go in any case, so that nothing is read in vain when little has to go
    local sure = math.max(first - 1 - seq, math.ceil((target - cumulative) / math.max(s.largest, 1)), few)
    local entries = call('XRANGE', frames_key, string.format('%d-0', seq + 1), '+',
      'COUNT', math.min(sure, many, limit - seq))
    if #entries == 0 then break end
    for i = 1, #entries do
      if seq >= first - 1 and cumulative >= target then break end
      seq = tonumber(string.match(entries[i][1], '^%d+'))
      cumulative = cumulative + #entries[i][2][6]
    end
    few = 8
  end
  call('XTRIM', frames_key, 'MINID', string.format('%d-0', seq + 1))
  if math.floor(cumulative / INDEX_STRIDE) > math.floor(s.trimmed / INDEX_STRIDE) then
    call('ZREMRANGEBYSCORE', index_key, '-inf', cumulative)
  end
  s.earliest, s.trimmed, s.rarely_changed = seq + 1, cumulative, true
end

-- Retention by count and bytes; the newest frame always stays. Frames after `keep_from`, which is where the
-- oldest run whose ending is not delivered yet began, stay up to twice the bounds. A large bound may be
-- exceeded by a hundredth: to drop frame by frame would cost as much again as to append them, because the
-- bytes of each had to be read back.
local function apply_retention(frames_key, index_key, s)
  local first, target = s.earliest, s.trimmed
  local spare_frames = s.max_frames >= 10000 and math.floor(s.max_frames / 100) or 0
  local spare_bytes = s.max_bytes >= 100 * INDEX_STRIDE and math.floor(s.max_bytes / 100) or 0
  if s.max_frames > 0 then first = s.last_seq - s.max_frames + 1 end
  if s.max_bytes > 0 then target = s.bytes - s.max_bytes end
  if first <= s.earliest and target <= s.trimmed then return end
  if s.keep_from then
    local limit = math.min(s.keep_from, s.last_seq - 1)
    drop_prefix(frames_key, index_key, s, first, target, limit, spare_frames, spare_bytes)
    first, target = first - s.max_frames, target - s.max_bytes
    if first <= s.earliest and target <= s.trimmed then return end
  end
  drop_prefix(frames_key, index_key, s, first, target, s.last_seq - 1, spare_frames, spare_bytes)
end

-- When the keys expire: a tenth of the retention late, so that renewing once per tenth is never too late.
local function expires_at(s)
  return math.floor(s.renewed + s.retention_ms * 1.1)
end

-- Renew the expiry of every key of the stream when it is due; says whether it was.
local function renew(s, now, frames_key, meta_key, index_key, open_key, runs_key, run_prefix)
  if s.retention_ms == 0 then return false end
  if now - s.renewed <= s.retention_ms / 10 then
    if s.index_grew then call('PEXPIREAT', index_key, expires_at(s)) end
    if s.reborn then call('PEXPIREAT', frames_key, expires_at(s)) end
    return false
  end
  s.renewed, s.rarely_changed = now, true
  local at = expires_at(s)
  local undelivered_key = string.sub(meta_key, 1, -5) .. 'undelivered'
  for _, key in ipairs({frames_key, meta_key, index_key, open_key, runs_key, undelivered_key}) do
    call('PEXPIREAT', key, at)
  end
  for _, run in ipairs(call('ZRANGE', runs_key, 0, -1)) do call('PEXPIREAT', run_prefix .. run, at) end
  return true
end

