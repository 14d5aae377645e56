package reactor

import "stockade.dev/plugin/internal/dispatch"

// The names of the contract. All are exported, whatever the plugin handles; the manifest says what it
// is asked for.

//go:wasmexport stockade_start
func start(length int32) int32 { return dispatch.Run(registered, length) }

//go:wasmexport stockade_timer
func timer(length int32) int32 { return dispatch.Run(registered, length) }

//go:wasmexport stockade_events
func events(length int32) int32 { return dispatch.Run(registered, length) }

//go:wasmexport stockade_call
func call(length int32) int32 { return dispatch.Run(registered, length) }

//go:wasmexport stockade_rank
func rank(length int32) int32 { return dispatch.Run(registered, length) }

//go:wasmexport stockade_shutdown
func shutdown(length int32) int32 { return dispatch.Run(registered, length) }
