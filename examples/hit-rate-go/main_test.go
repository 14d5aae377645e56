package main

import (
	"slices"
	"testing"
	"time"

	"stockade.dev/plugin"
	"stockade.dev/plugin/plugintest"
)

func lookup(tokens, hitTokens uint64) plugin.Event {
	return plugin.Event{Type: plugin.Lookup, Tokens: tokens, HitTokens: hitTokens}
}

func start(t *testing.T, host *plugintest.Host) *plugintest.Running {
	t.Helper()
	running, err := host.Start(&hitRate{})
	if err != nil {
		t.Fatal(err)
	}
	return running
}

func newHost(t *testing.T) *plugintest.Host {
	host := plugintest.New(t).Grant(plugintest.Events).Setting("under_test.seconds", 10)
	host.StateKiB = 1
	return host
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestItSaysWhatWasHitSinceTheLastLook(t *testing.T) {
	host := newHost(t)
	running := start(t, host)
	must(t, running.Events(lookup(512, 256), lookup(512, 512)))
	must(t, running.Advance(10*time.Second))
	if percent := host.Gauges["hit_percent"]; percent != 75 {
		t.Errorf("%v %%", percent)
	}
	must(t, running.Advance(10*time.Second))
	if percent := host.Gauges["hit_percent"]; percent != 0 {
		t.Errorf("%v %%", percent)
	}
	want := []string{"watching; 0 lookups in earlier runs", "75.0 % of 1024 tokens hit in 2 lookups"}
	if !slices.Equal(host.LogLines(), want) {
		t.Errorf("said %q", host.LogLines())
	}
}

func TestCountsOutliveTheRun(t *testing.T) {
	host := newHost(t)
	running := start(t, host)
	must(t, running.Events(lookup(512, 0)))
	must(t, running.Shutdown())
	running = start(t, host)
	report, err := running.Call("it.report", nil)
	must(t, err)
	if string(report) != `{"lookups":1,"tokens":512,"hit_tokens":0}` {
		t.Errorf("report %s", report)
	}
	if _, err := running.Call("it.nothing", nil); err == nil {
		t.Error("a method that does not exist succeeded")
	}
}
