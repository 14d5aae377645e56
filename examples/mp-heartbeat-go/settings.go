package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"
)

// defaultInterval is the time between two heartbeats where nothing else is set.
const defaultInterval = 30 * time.Second

const minSeconds, maxSeconds = 0.1, 86400.0

// object is a JSON object; a nil one has no members.
type object = map[string]any

// decode keeps numbers as they are written, so that 256 is shown as 256 and 1.0 as 1.0.
func decode(text string) (any, error) {
	decoder := json.NewDecoder(strings.NewReader(text))
	decoder.UseNumber()
	var value any
	if err := decoder.Decode(&value); err != nil {
		return nil, err
	}
	if decoder.More() {
		return nil, errors.New("something follows the first value")
	}
	return value, nil
}

// parseConfig gives the configuration as a JSON object, or an error that says what is wrong with the text.
func parseConfig(text string) (object, error) {
	if strings.TrimSpace(text) == "" {
		return nil, errors.New("LMCACHE_RUNTIME_PLUGIN_CONFIG is empty: nothing to show")
	}
	value, err := decode(text)
	if err != nil {
		return nil, fmt.Errorf("LMCACHE_RUNTIME_PLUGIN_CONFIG is not JSON: %w", err)
	}
	config, ok := value.(object)
	if !ok {
		return nil, errors.New("LMCACHE_RUNTIME_PLUGIN_CONFIG is not a JSON object")
	}
	return config, nil
}

// lookup gives the value at path, or nil where the path ends early.
func lookup(value any, path ...string) any {
	for _, key := range path {
		members, _ := value.(object)
		value = members[key]
	}
	return value
}

// show spells a value as JSON does, strings bare, and one that is not there as "?".
func show(value any) string {
	switch value := value.(type) {
	case nil:
		return "?"
	case string:
		return value
	}
	text, err := json.Marshal(value)
	if err != nil {
		return "?"
	}
	return string(text)
}

// summary is the line that describes the server, without the plugin's name in front.
func summary(config object) string {
	mp := config["mp_config"]
	return fmt.Sprintf("MP server: host=%s port=%s chunk_size=%s eviction=%s",
		show(lookup(mp, "host")), show(lookup(mp, "port")), show(lookup(mp, "chunk_size")),
		show(lookup(config, "storage_manager_config", "eviction_config", "eviction_policy")))
}

// heartbeatInterval is <plugin>.heartbeat_seconds of the extra configuration. LMCache's own server
// leaves extra empty; there the same settings are a section of config. An interval is returned even
// with an error, which says what is wrong with the setting.
func heartbeatInterval(extra string, config object, plugin string) (time.Duration, error) {
	settings := config["runtime_plugin_extra_config"]
	if strings.TrimSpace(extra) != "" {
		var err error
		if settings, err = decode(extra); err != nil {
			return defaultInterval, fmt.Errorf("LMCACHE_RUNTIME_PLUGIN_EXTRA_CONFIG is not JSON: %w", err)
		}
	}
	key := plugin + ".heartbeat_seconds"
	value := lookup(settings, key)
	if value == nil {
		return defaultInterval, nil
	}
	number, _ := value.(json.Number)
	seconds, err := number.Float64()
	if err != nil || seconds < minSeconds || seconds > maxSeconds {
		return defaultInterval, fmt.Errorf("%s is not a number from %g to %g: using %g",
			key, minSeconds, maxSeconds, defaultInterval.Seconds())
	}
	return time.Duration(seconds * float64(time.Second)), nil
}
