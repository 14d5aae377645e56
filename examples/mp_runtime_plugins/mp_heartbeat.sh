#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# A native plugin in Bash: shows the server's settings, then a heartbeat until it is told to stop.
#
# The server passes its settings as JSON in LMCACHE_RUNTIME_PLUGIN_CONFIG and makes each line
# printed here one line of its log. It asks a plugin to stop with SIGTERM. The interval comes from
#     --runtime-plugin-config '{"mp_heartbeat.heartbeat_seconds": 5}'
# JSON is read by jq, or by python3 where there is no jq; with neither, only the heartbeat is left.

NAME=mp_heartbeat
DEFAULT_INTERVAL_SECONDS=30

say() { printf '[%s] %s\n' "$NAME" "$*"; }

# The sleep must not outlive us. It may have been forked just now and not know SIGTERM's default yet: SIGKILL.
stop() {
  local sleeper
  for sleeper in $(jobs -p); do kill -KILL "$sleeper" 2> /dev/null; wait "$sleeper" 2> /dev/null; done
  say "Received $1, exiting"
  exit 0
}

# Both readers print one line each for host, port, chunk size, eviction policy and interval;
# "?" stands for a value that is not there.
read_with_jq() {
  # shellcheck disable=SC2016  # $extra and $name are jq's
  printf '%s' "$1" | jq -r --arg extra "$2" --arg name "$NAME" '
    def shown: if . == null then "?" else tostring end;
    if type != "object" then error("not an object") else . end
    | (if ($extra | test("\\S")) then ($extra | fromjson) else .runtime_plugin_extra_config end) as $settings
    | (.mp_config?.host? | shown), (.mp_config?.port? | shown), (.mp_config?.chunk_size? | shown),
      (.storage_manager_config?.eviction_config?.eviction_policy? | shown),
      ($settings[$name + ".heartbeat_seconds"]? | if . == null then "?" else tojson end)' 2> /dev/null
}

read_with_python() {
  printf '%s' "$1" | python3 -c '
import json, sys
extra, name = sys.argv[1:]
config = json.load(sys.stdin)
settings = json.loads(extra) if extra.strip() else config.get("runtime_plugin_extra_config")
def at(value, *path):
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value
for path in ("mp_config", "host"), ("mp_config", "port"), ("mp_config", "chunk_size"), \
            ("storage_manager_config", "eviction_config", "eviction_policy"):
    value = at(config, *path)
    print("?" if value is None else value if isinstance(value, str) else json.dumps(value))
value = at(settings, name + ".heartbeat_seconds")
print("?" if value is None else json.dumps(value))' "$2" "$NAME" 2> /dev/null
}

main() {
  local config=${LMCACHE_RUNTIME_PLUGIN_CONFIG-} extra=${LMCACHE_RUNTIME_PLUGIN_EXTRA_CONFIG-}
  local interval=$DEFAULT_INTERVAL_SECONDS heartbeats=0 fields='' host port chunk_size eviction wanted
  trap 'stop SIGTERM' TERM
  trap 'stop SIGINT' INT
  say "Started"

  if [ -z "$config" ]; then
    say "WARNING: LMCACHE_RUNTIME_PLUGIN_CONFIG is empty: nothing to show"
  elif command -v jq > /dev/null 2>&1; then
    fields=$(read_with_jq "$config" "$extra") || fields=
  elif command -v python3 > /dev/null 2>&1; then
    fields=$(read_with_python "$config" "$extra") || fields=
  else
    say "WARNING: neither jq nor python3 is here to read the configuration: heartbeat only"
    config=
  fi
  if [ -n "$fields" ]; then
    { read -r host; read -r port; read -r chunk_size; read -r eviction; read -r wanted; } <<< "$fields"
    say "MP server: host=$host port=$port chunk_size=$chunk_size eviction=$eviction"
    if [[ $wanted =~ ^(0\.[1-9][0-9]*|[1-9][0-9]{0,4}(\.[0-9]+)?)$ ]] && [ "${wanted%.*}" -le 86400 ]; then
      interval=$wanted
    elif [ "$wanted" != '?' ]; then
      say "WARNING: $NAME.heartbeat_seconds is not a number from 0.1 to 86400: using $interval"
    fi
  elif [ -n "$config" ]; then
    say "WARNING: LMCACHE_RUNTIME_PLUGIN_CONFIG or LMCACHE_RUNTIME_PLUGIN_EXTRA_CONFIG is not a JSON object"
  fi

  while say "heartbeat #$heartbeats"; do       # a failing say means that nobody reads our lines any more
    heartbeats=$((heartbeats + 1))
    # `wait` returns at once when a signal arrives; a sleep in the foreground would be waited for.
    sleep "$interval" > /dev/null 2>&1 &
    wait "$!" || { say "ERROR: cannot sleep for $interval seconds"; exit 1; }
  done
}

# Sourced by its test, run by the server.
if [ "${BASH_SOURCE[0]}" = "$0" ]; then main; fi
