// A sandboxed plugin: shows the server's settings, then a heartbeat until it is told to stop.
//
// The server passes its settings as JSON in an environment variable, makes each line printed here
// one line of its log, and asks a plugin to stop by closing its standard input.
package main

import (
	"fmt"
	"os"
)

// name stands in front of every line and of this plugin's own settings.
const name = "mp_heartbeat_go"

func main() {
	say("Started")
	config, err := parseConfig(os.Getenv("LMCACHE_RUNTIME_PLUGIN_CONFIG"))
	if err != nil {
		say("WARNING: " + err.Error())
	}
	say(summary(config))
	interval, err := heartbeatInterval(os.Getenv("LMCACHE_RUNTIME_PLUGIN_EXTRA_CONFIG"), config, name)
	if err != nil {
		say("WARNING: " + err.Error())
	}

	for heartbeats := 0; ; heartbeats++ {
		say(fmt.Sprintf("heartbeat #%d", heartbeats))
		if stopRequestedWithin(interval) {
			say("Asked to stop, exiting")
			return
		}
	}
}

func say(line string) {
	if _, err := fmt.Printf("[%s] %s\n", name, line); err != nil {
		os.Exit(1) // Nobody reads our lines any more, so there is nobody to tell.
	}
}
