package main

import (
	"slices"
	"testing"
	"time"

	"stockade.dev/plugin"
	"stockade.dev/plugin/plugintest"
)

func TestItCountsLookups(t *testing.T) {
	host := plugintest.New(t).Grant(plugintest.Events)
	running, err := host.Start(&myPlugin{})
	if err != nil {
		t.Fatal(err)
	}
	lookup := plugin.Event{Type: plugin.Lookup, Tokens: 512, HitTokens: 256}
	if err := running.Events(lookup, lookup); err != nil {
		t.Fatal(err)
	}
	reply, err := running.Call("my_plugin.lookups", nil)
	if err != nil || string(reply) != "2" {
		t.Errorf("%q, %v", reply, err)
	}
	if err := running.Advance(30 * time.Second); err != nil {
		t.Fatal(err)
	}
	if want := []string{"under_test has started", "2 lookups"}; !slices.Equal(host.LogLines(), want) {
		t.Errorf("logged %q", host.LogLines())
	}
}
