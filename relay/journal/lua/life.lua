-- What the operations that begin and end runs share beside stream.lua; redis_streams.py puts it behind that,
-- but not before append.lua, which would pay for it with every frame. An opening comes packed, with the names
-- that new_stream, new_run and open_run.lua use, and so does an ending: {status, reason, error, error as JSON
-- (or empty), {dialect = {event, data}}}.

-- A stream that is not there yet, whose ids are beyond those of its former life.
local function new_stream(now, tombstone_key, opening)
  local former_ms = tonumber(call('GET', tombstone_key) or -1)
  return {
    new = true, rarely_changed = true, created = math.max(now, former_ms + 1), last_seq = 0, last_ms = 0,
    earliest = 1, bytes = 0, trimmed = 0, indexed = 0, largest = 0, last_data = 0, renewed = 0,
    max_frames = opening.max_frames, max_bytes = opening.max_bytes, retention_ms = opening.retention_ms,
  }
end

-- What save_stream leaves out because it changes only by its own operation.
local function save_new_stream(meta_key, s)
  call('HSET', meta_key, 'max_frames', s.max_frames, 'max_bytes', s.max_bytes, 'retention_ms', s.retention_ms,
    'sealed', 0, 'metadata', '', 'latest_run', '')
end

-- Write down a run whose first `extra` frames, at `ms`, end with the stream's last one.
local function new_run(s, meta_key, open_key, runs_key, run_key, name, opening, start_seq, start_ms, ms, extra)
  call('HSET', run_key, 'status', 'open', 'writer', opening.writer, 'frames', 0, 'extra', extra, 'text_bytes', 0,
    'reason', '', 'last_seq', s.last_seq, 'last_ms', ms, 'last_data', 0, 'token', opening.token,
    'start_seq', start_seq, 'start_ms', start_ms, 'first_seq', start_seq + 1, 'first_ms', ms,
    'ended_ms', 0, 'error', '', 'dialect', opening.dialect, 'metadata', opening.metadata, 'answer', opening.answer,
    'owner', opening.owner, 'idle_ms', opening.idle_ms, 'max_run_ms', opening.max_run_ms, 'heard_ms', ms,
    'deliver', opening.deliver)
  call('ZADD', runs_key, start_seq, name)
  call('ZADD', open_key, start_seq, name)
  call('HSET', meta_key, 'latest_run', name)
  if opening.deliver ~= '' then
    -- Retention by count and bytes waits for the run's delivery from its start.
    call('ZADD', string.sub(meta_key, 1, -5) .. 'undelivered', start_seq, name)
    if not s.keep_from or start_seq < s.keep_from then
      s.keep_from = start_seq
      call('HSET', meta_key, 'keep_from', start_seq)
    end
  end
end

-- The expiry of keys that were made just now, or may have been.
local function expire_new(s, frames_key, meta_key, open_key, runs_key, run_key)
  if s.retention_ms == 0 then return end
  local undelivered_key = string.sub(meta_key, 1, -5) .. 'undelivered'
  for _, key in ipairs({frames_key, meta_key, open_key, runs_key, run_key, undelivered_key}) do
    call('PEXPIREAT', key, expires_at(s))
  end
end

-- The members of a run that an ending needs; nil for a run that is not there.
local function load_run(run_key)
  local v = call('HMGET', run_key, 'status', 'reason', 'frames', 'text_bytes', 'extra', 'dialect', 'answer',
    'owner', 'deliver', 'ended_ms', 'start_seq', 'last_seq')
  if not v[1] then return nil end
  return {
    key = run_key, status = v[1], reason = v[2], frames = tonumber(v[3]), text_bytes = tonumber(v[4]),
    extra = tonumber(v[5]), dialect = v[6], answer = v[7], owner = v[8], deliver = v[9],
    ended_ms = tonumber(v[10]), start_seq = tonumber(v[11]), last_seq = tonumber(v[12]),
  }
end

local function say(message, name, event, data)
  local n = #message
  message[n + 1], message[n + 2], message[n + 3] = name, event, data
end

-- What relay itself says before the end of a run, in the run's own dialect.
local function last_words(r, ending)
  return r.answer ~= '' and ending[5][r.dialect]
end

-- Add to `message` what ends the run; `said` is {event, data} or false.
local function say_ending(message, name, r, ending, said)
  if said then
    say(message, name, said[1], said[2])
    r.said_error = true
  end
  local failure = ''
  if ending[4] ~= '' then failure = ',"error":' .. ending[4] end
  say(message, name, 'relay', string.format('{"type":"run.ended","run":"%s","status":"%s","reason":"%s"', name,
    ending[1], ending[2]) .. failure .. string.format(',"frames":%d,"text_bytes":%d}', r.frames, r.text_bytes))
  r.place = (#message - 3) / 3
end

-- Note an ending whose frames were added after `message[1]`; `extra` counts the run's frames of that step.
local function note_ending(message, open_key, name, r, ending, extra)
  local seq, ms = message[1] + r.place, message[3]
  call('HSET', r.key, 'status', ending[1], 'reason', ending[2], 'error', ending[3], 'ended_ms', ms,
    'last_seq', seq, 'last_ms', ms, 'extra', r.extra + extra)
  if r.said_error then call('HSET', r.key, 'last_data', seq - 1) end
  call('ZREM', open_key, name)
  r.status, r.reason, r.last_seq, r.ended_ms = ending[1], ending[2], seq, ms
end

-- Tell the process that owns the run, or owned it, that it is over.
local function tell_owner(owner_channels, owner, stream, name)
  if owner ~= '' then call('PUBLISH', owner_channels .. owner, stream .. ' ' .. name) end
end

