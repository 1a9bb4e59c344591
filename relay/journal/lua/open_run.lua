-- Open a run and journal its run.started; create the stream if there is none; supersede other runs.
-- KEYS: 1 frames  2 meta  3 index  4 open  5 runs  6 run  7 tombstone
-- ARGV: 1 stream  2 run  3 channel  4 prefix of owners' channels  5 what tells followers of a sealing
--       6 opening  7 data of run.started  8 if_busy  9 ending of superseded runs  10… runs to supersede
-- Replies: {'ok', start seq, start ms, first seq, first ms, last seq, frames after,
--           superseded runs, runs after (both joined by spaces),
--           {run, last seq, owner, delivery} of each ended now;
--           the last is left out when the run was opened before}
--          | {'run_exists'} | {'stream_sealed'} | {'stream_busy', runs} | {'unknown_run', run}

local frames, meta, index, open, runs, run = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local name, opening = ARGV[2], cmsgpack.unpack(ARGV[6])
local run_prefix = string.sub(run, 1, #run - #name)

local known = call('HMGET', run, 'writer', 'start_seq', 'start_ms', 'first_seq', 'first_ms', 'opened_seq',
  'frames_after', 'superseded', 'runs_after')
if known[1] then
  if known[1] ~= opening.writer then return {'run_exists'} end
  return {'ok', tonumber(known[2]), tonumber(known[3]), tonumber(known[4]), tonumber(known[5]),
    tonumber(known[6] or known[4]), tonumber(known[7] or 0), known[8] or '', known[9] or ''}
end

local now = clock_ms()
local s = load_stream(meta)
if s then
  if call('HGET', meta, 'sealed') == '1' then return {'stream_sealed'} end
else
  s = new_stream(now, KEYS[7], opening)
end

-- Which runs are superseded, oldest first.
local old, is_old = {}, {}
local function supersede(of)
  if is_old[of] then return true end
  local r = load_run(run_prefix .. of)
  if not r then return false end
  r.name, is_old[of] = of, true
  old[#old + 1] = r
  return true
end
if ARGV[8] ~= 'allow' then
  local busy = call('ZRANGE', open, 0, -1)
  if ARGV[8] == 'reject' and busy[1] then return {'stream_busy', busy} end
  for _, of in ipairs(busy) do supersede(of) end
end
for i = 10, #ARGV do
  local of = ARGV[i]
  if of == 'latest' then of = call('HGET', meta, 'latest_run') or '' end
  if of ~= '' and not supersede(of) then return {'unknown_run', of} end
end
table.sort(old, function(a, b) return a.start_seq < b.start_seq end)

-- What stood at or after the start of the first of them and is not theirs.
local frames_after, runs_after = 0, {}
if old[1] then
  frames_after = s.last_seq - old[1].start_seq
  for _, r in ipairs(old) do frames_after = frames_after - r.frames - r.extra end
  frames_after = math.max(0, frames_after)
end
if frames_after > 0 then
  local from = old[1].start_seq
  local before = call('ZREVRANGEBYSCORE', runs, '(' .. from, '-inf', 'LIMIT', 0, 64)
  for i = #before, 1, -1 do
    local last_seq = call('HGET', run_prefix .. before[i], 'last_seq')
    if last_seq and tonumber(last_seq) > from then runs_after[#runs_after + 1] = before[i] end
  end
  for _, other in ipairs(call('ZRANGEBYSCORE', runs, from, '+inf', 'LIMIT', 0, 64 + #old)) do
    if not is_old[other] and #runs_after < 64 then runs_after[#runs_after + 1] = other end
  end
end

local message = {0, 0, 0}
local ending = cmsgpack.unpack(ARGV[9])
for _, r in ipairs(old) do
  if r.status == 'open' then
    r.ends, r.from = true, #message
    say(message, r.name, 'relay', string.format('{"type":"run.superseded","run":"%s","by":"%s"}', r.name, name))
    say_ending(message, r.name, r, ending, last_words(r, ending))
  end
end
local before = (#message - 3) / 3
say(message, name, 'relay', ARGV[7])
for _, r in ipairs(old) do
  if not r.ends then
    say(message, name, 'relay', string.format('{"type":"run.superseded","run":"%s","by":"%s"}', r.name, name))
  end
end
local extra = (#message - 3) / 3 - before
local refusal = add_frames(frames, index, s, now, message)
if refusal then return refusal end

local superseded, ended = {}, {}
for _, r in ipairs(old) do
  if r.ends then superseded[#superseded + 1] = r.name end
end
for _, r in ipairs(old) do
  if not r.ends then superseded[#superseded + 1] = r.name end
  call('HSET', r.key, 'superseded_by', name)
  if r.ends then
    note_ending(message, open, r.name, r, ending, r.place - (r.from - 3) / 3)
    ended[#ended + 1] = {r.name, r.last_seq, r.owner, r.deliver}
  end
end
local start_seq, start_ms, ms = message[1] + before, message[2], message[3]
if before > 0 then start_ms = ms end
if s.new then save_new_stream(meta, s) end
new_run(s, meta, open, runs, run, name, opening, start_seq, start_ms, ms, extra)
if old[1] then
  call('HSET', run, 'opened_seq', s.last_seq, 'frames_after', frames_after,
    'superseded', table.concat(superseded, ' '), 'runs_after', table.concat(runs_after, ' '))
end
apply_retention(frames, index, s)
renew(s, now, frames, meta, index, open, runs, run_prefix)
save_stream(meta, s)
expire_new(s, frames, meta, open, runs, run)
call('PUBLISH', ARGV[3], cmsgpack.pack(message))
for _, r in ipairs(ended) do tell_owner(ARGV[4], r[3], ARGV[1], r[1]) end
if opening.seal then
  call('HSET', meta, 'sealed', 1)
  call('PUBLISH', ARGV[3], ARGV[5])
end
return {'ok', start_seq, start_ms, start_seq + 1, ms, s.last_seq, frames_after,
  table.concat(superseded, ' '), table.concat(runs_after, ' '), ended}
