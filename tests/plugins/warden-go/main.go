// A plugin of the tests: a call has it list what the cache holds, pin the first object, evict the
// second and load it again, and count that in its state. ../warden-rust is the same in Rust.
package main

import (
	"encoding/json"
	"fmt"
	"time"

	"stockade.dev/plugin"
	"stockade.dev/plugin/reactor"
)

type report struct {
	Listed        int    `json:"listed"`
	Pinned        uint64 `json:"pinned"`
	IsShownPinned bool   `json:"is_shown_pinned"`
	Evicted       uint64 `json:"evicted"`
	Loaded        uint64 `json:"loaded"`
	Rounds        uint64 `json:"rounds"`
}

type warden struct{}

func (warden) Start(*plugin.Start) error { return nil }

func (warden) Call(*plugin.Call) ([]byte, error) {
	page, err := plugin.Keys(plugin.KeyQuery{})
	if err != nil {
		return nil, err
	}
	if len(page.Keys) < 2 {
		return nil, fmt.Errorf("the cache holds %d objects", len(page.Keys))
	}
	first, second := page.Keys[0].Key, page.Keys[1].Key
	told := report{Listed: len(page.Keys)}
	outcome, err := plugin.Pin(time.Minute, first)
	if err != nil {
		return nil, err
	}
	told.Pinned = outcome.Done
	again, err := plugin.Keys(plugin.KeyQuery{})
	if err != nil {
		return nil, err
	}
	for _, key := range again.Keys {
		told.IsShownPinned = told.IsShownPinned || key.Key == first && key.Pinned
	}
	if outcome, err = plugin.Evict(second); err != nil {
		return nil, err
	}
	told.Evicted = outcome.Done
	if outcome, err = plugin.Prefetch(second); err != nil {
		return nil, err
	}
	told.Loaded = outcome.Done
	if _, err = plugin.Unpin(first); err != nil {
		return nil, err
	}
	if _, err = plugin.GetStateJSON("rounds", &told.Rounds); err != nil {
		return nil, err
	}
	told.Rounds++
	if err = plugin.SetStateJSON("rounds", told.Rounds); err != nil {
		return nil, err
	}
	return json.Marshal(told)
}

func init() { reactor.Register(warden{}) }

func main() {}
