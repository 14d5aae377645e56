// Package plugin is what a plugin for the Stockade KV-cache server is written with.
//
// A plugin is a sandboxed WebAssembly module. This module is the safe face of the contract
// stockade:plugin/v1 (plugin-sdk/abi/README.md), which says what each call costs and needs.
//
// # A reactor
//
// The usual style: the server calls the handlers of a [Plugin], and it is asleep in between. Package
// reactor exports it; build it with GOOS=wasip1 GOARCH=wasm go build -buildmode=c-shared.
//
//	package main
//
//	import (
//		"time"
//
//		"stockade.dev/plugin"
//		"stockade.dev/plugin/reactor"
//	)
//
//	type heartbeat struct{ beats int }
//
//	func (h *heartbeat) Start(start *plugin.Start) error {
//		return plugin.Every("beat", 30*time.Second)
//	}
//
//	func (h *heartbeat) Timer(timer *plugin.Timer) error {
//		h.beats++
//		plugin.Infof("heartbeat #%d", h.beats)
//		return nil
//	}
//
//	func init() { reactor.Register(&heartbeat{}) }
//
//	func main() {}
//
// # A command
//
// A program with a main that waits for what happens with [NextMessage], which blocks every
// goroutine meanwhile. A program that only prints needs no module at all.
//
// # Tests
//
// On every other system than wasip1 the calls go to a double, so the tests of a plugin run with a
// plain go test: see package plugintest.
package plugin
