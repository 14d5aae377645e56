package main

import (
	"strings"
	"testing"
	"time"
)

const full = `{"mp_config": {"host": "127.0.0.1", "port": 5555, "chunk_size": 256},
 "storage_manager_config": {"eviction_config": {"eviction_policy": "LRU"}},
 "runtime_plugin_extra_config": {"p.heartbeat_seconds": 7}}`

func parsed(t *testing.T, text string) object {
	t.Helper()
	config, err := parseConfig(text)
	if err != nil {
		t.Fatal(err)
	}
	return config
}

func TestSummary(t *testing.T) {
	cases := map[string]string{
		full:                           "MP server: host=127.0.0.1 port=5555 chunk_size=256 eviction=LRU",
		`{}`:                           "MP server: host=? port=? chunk_size=? eviction=?",
		`{"mp_config": [1]}`:           "MP server: host=? port=? chunk_size=? eviction=?",
		`{"mp_config": {"host":null}}`: "MP server: host=? port=? chunk_size=? eviction=?",
		`{"mp_config": {"port":1.0, "host":true}}`: "MP server: host=true port=1.0 chunk_size=? eviction=?",
	}
	for text, want := range cases {
		if got := summary(parsed(t, text)); got != want {
			t.Errorf("summary(%s) = %q, want %q", text, got, want)
		}
	}
}

func TestOnlyAJSONObjectIsAConfig(t *testing.T) {
	cases := map[string]string{"": "is empty", " \n": "is empty", "[1]": "not a JSON object", "{": "is not JSON", "{} {}": "is not JSON"}
	for text, want := range cases {
		if _, err := parseConfig(text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("parseConfig(%q): %v, want %q", text, err, want)
		}
	}
	if got := summary(nil); !strings.Contains(got, "host=?") {
		t.Errorf("summary(nil) = %q", got)
	}
}

func TestInterval(t *testing.T) {
	cases := map[string]time.Duration{
		`{"p.heartbeat_seconds": 0.5}`:   500 * time.Millisecond,
		`{"p.heartbeat_seconds": 86400}`: 24 * time.Hour,
		`{"other": 1}`:                   defaultInterval,
		``:                               7 * time.Second,
	}
	for extra, want := range cases {
		if got, err := heartbeatInterval(extra, parsed(t, full), "p"); err != nil || got != want {
			t.Errorf("heartbeatInterval(%s) = %v, %v, want %v", extra, got, err, want)
		}
	}
}

func TestAnUnusableIntervalIsNamed(t *testing.T) {
	const want = "p.heartbeat_seconds is not a number from 0.1 to 86400: using 30"
	for _, value := range []string{`0`, `-1`, `0.09`, `86401`, `1e999`, `"5"`, `true`, `[]`} {
		got, err := heartbeatInterval(`{"p.heartbeat_seconds": `+value+`}`, nil, "p")
		if got != defaultInterval || err == nil || err.Error() != want {
			t.Errorf("%s: %v, %v", value, got, err)
		}
	}
	if _, err := heartbeatInterval(`{`, nil, "p"); err == nil || !strings.Contains(err.Error(), "EXTRA_CONFIG is not JSON") {
		t.Errorf("bad extra configuration: %v", err)
	}
}
