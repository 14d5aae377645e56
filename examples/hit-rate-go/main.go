// A sandboxed plugin: the hit rate since the last look and in all, as log lines, a metric and a call.
// ../hit-rate-rust is the same in Rust.
package main

import (
	"encoding/json"
	"fmt"
	"time"

	"stockade.dev/plugin"
	"stockade.dev/plugin/reactor"
)

// defaultInterval is the time between two looks where nothing else is set.
const defaultInterval = 30 * time.Second

// counts are lookups and their tokens.
type counts struct {
	Lookups   uint64 `json:"lookups"`
	Tokens    uint64 `json:"tokens"`
	HitTokens uint64 `json:"hit_tokens"`
}

func (c *counts) percent() float64 {
	if c.Tokens == 0 {
		return 0
	}
	return 100 * float64(c.HitTokens) / float64(c.Tokens)
}

type hitRate struct {
	all   counts // also in earlier runs
	fresh counts // since the last look
}

func (h *hitRate) Start(start *plugin.Start) error {
	config, err := plugin.LoadConfig()
	if err != nil {
		return err
	}
	interval, err := config.Seconds(start.Plugin+".seconds", 0.1, 86_400, defaultInterval)
	if err != nil {
		return err
	}
	if err := plugin.EveryAfter("look", interval, interval); err != nil {
		return err
	}
	if _, err := plugin.Subscribe(plugin.Subscription{Types: []plugin.EventType{plugin.Lookup}}); err != nil {
		return err
	}
	if _, err := plugin.GetStateJSON("counts", &h.all); err != nil {
		return err
	}
	plugin.Infof("watching; %d lookups in earlier runs", h.all.Lookups)
	return nil
}

func (h *hitRate) Events(batch *plugin.EventBatch) error {
	if batch.Lost > 0 {
		plugin.Warnf("%d events were lost", batch.Lost)
	}
	for _, event := range batch.Events {
		if event.Type == plugin.Lookup {
			for _, counts := range []*counts{&h.all, &h.fresh} {
				counts.Lookups++
				counts.Tokens += event.Tokens
				counts.HitTokens += event.HitTokens
			}
		}
	}
	return nil
}

func (h *hitRate) Timer(*plugin.Timer) error {
	fresh := h.fresh
	h.fresh = counts{}
	if fresh.Lookups > 0 {
		plugin.Infof("%.1f %% of %d tokens hit in %d lookups", fresh.percent(), fresh.Tokens, fresh.Lookups)
		if err := plugin.SetStateJSON("counts", h.all); err != nil {
			return err
		}
	}
	return plugin.SetMetric("hit_percent", fresh.percent())
}

func (h *hitRate) Shutdown(*plugin.Shutdown) error {
	return plugin.SetStateJSON("counts", h.all)
}

func (h *hitRate) Call(call *plugin.Call) ([]byte, error) {
	if call.Name() == "report" {
		return json.Marshal(h.all)
	}
	return nil, fmt.Errorf("no method `%s`: there is `report`", call.Name())
}

func init() { reactor.Register(&hitRate{}) }

func main() {}
