// Package reactor exports a plugin as a reactor. It is for modules built with -buildmode=c-shared:
//
//	func init() { reactor.Register(&mine{}) }
//
//	func main() {}
package reactor

import "stockade.dev/plugin"

var registered plugin.Plugin

// Register makes p the plugin that the module exports. Call it once, in an init function: main is not
// called in a reactor.
func Register(p plugin.Plugin) { registered = p }
