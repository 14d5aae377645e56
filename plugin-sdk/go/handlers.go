package plugin

// Plugin is a reactor: the server calls its methods, one at a time, and it is asleep in between. Start is
// called once; timers and subscriptions are made there. An error of it ends the plugin, which the
// supervisor restarts as its manifest says.
//
// What else it handles, it says by its methods: [TimerHandler], [EventHandler], [Callable], [Ranker],
// [ShutdownHandler]. An error of these is logged and counted, and the plugin goes on. A method that takes
// longer than the manifest's call_ms ends the plugin.
type Plugin interface {
	Start(*Start) error
}

// TimerHandler is a plugin with timers.
type TimerHandler interface {
	Timer(*Timer) error
}

// EventHandler is a plugin that subscribes to events.
type EventHandler interface {
	Events(*EventBatch) error
}

// Callable is a plugin that serves calls. Needs calls = true in its manifest.
type Callable interface {
	// Call answers a call with the bytes of its reply. On an error the caller gets success=false.
	Call(*Call) ([]byte, error)
}

// Ranker is a plugin that ranks candidates for eviction. Needs rank = true in its manifest.
type Ranker interface {
	// Rank gives the IDs of candidates, first to go first. Those that are left out follow in the native
	// order. On an error the native order is used for this call, and the fallback is counted.
	Rank(*Rank) ([]uint32, error)
}

// ShutdownHandler is a plugin that has something to do before it ends.
type ShutdownHandler interface {
	Shutdown(*Shutdown) error
}
