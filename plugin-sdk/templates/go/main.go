// A plugin that counts lookups, and says how many when it is called.
package main

import (
	"fmt"
	"strconv"
	"time"

	"stockade.dev/plugin"
	"stockade.dev/plugin/reactor"
)

type myPlugin struct {
	lookups int
}

func (p *myPlugin) Start(start *plugin.Start) error {
	config, err := plugin.LoadConfig()
	if err != nil {
		return err
	}
	interval, err := config.Seconds("my_plugin.seconds", 0.1, 86_400, 30*time.Second)
	if err != nil {
		return err
	}
	if err := plugin.EveryAfter("report", interval, interval); err != nil {
		return err
	}
	if _, err := plugin.Subscribe(plugin.Subscription{Types: []plugin.EventType{plugin.Lookup}}); err != nil {
		return err
	}
	plugin.Infof("%s has started", start.Plugin)
	return nil
}

func (p *myPlugin) Events(batch *plugin.EventBatch) error {
	for _, event := range batch.Events {
		if event.Type == plugin.Lookup {
			p.lookups++
		}
	}
	return nil
}

func (p *myPlugin) Timer(*plugin.Timer) error {
	plugin.Infof("%d lookups", p.lookups)
	return nil
}

func (p *myPlugin) Call(call *plugin.Call) ([]byte, error) {
	if call.Name() == "lookups" {
		return []byte(strconv.Itoa(p.lookups)), nil
	}
	return nil, fmt.Errorf("no method `%s`: there is `lookups`", call.Name())
}

func init() { reactor.Register(&myPlugin{}) }

func main() {}
