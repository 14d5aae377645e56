//go:build !wasip1

// Package abi has the imports of stockade:plugin/v1, one function each, without the pointers.
//
// Results are as the contract has them: at least 0 is success, below 0 a code. On other systems than
// wasip1 the same functions ask the double that package plugintest installs.
package abi

import "sync/atomic"

// Double answers the imports; each method is the import of its name.
type Double interface {
	Answer(length int) []byte
	AnswerLength() int32
	Message(length int) []byte
	MessageBody(length int) []byte
	NextMessage(timeoutMs int32) int32
	Reply(bytes []byte) int32
	Log(level int32, line string) int32
	Config() int32
	ClockMs() int64
	TimerSet(name string, afterMs, everyMs int32) int32
	TimerCancel(name string) int32
	StateGet(key string) int32
	StateSet(key string, value []byte) int32
	StateDelete(key string) int32
	StateKeys(prefix string) int32
	MetricAdd(name string, value float64) int32
	MetricSet(name string, value float64) int32
	CacheStats() int32
	CacheKeys(query []byte) int32
	CacheRequest(request []byte) int32
	EventsSubscribe(request []byte) int32
	HTTPRequest(request, body []byte) int32
	HTTPBodyRead(into []byte) int32
}

const unavailable = -6

var installed atomic.Pointer[Double]

// Install makes double answer from now on; nil takes it away.
func Install(double Double) {
	if double == nil {
		installed.Store(nil)
		return
	}
	installed.Store(&double)
}

// ask asks the double. Without one, every call is refused.
func ask[T any](otherwise T, call func(Double) T) T {
	if double := installed.Load(); double != nil {
		return call(*double)
	}
	return otherwise
}

func Answer(length int) []byte {
	none := []byte("there is no server: make one with plugintest.New first")
	return ask(none, func(d Double) []byte { return d.Answer(length) })
}
func AnswerLength() int32 { return ask(0, Double.AnswerLength) }
func Message(length int) []byte {
	return ask(nil, func(d Double) []byte { return d.Message(length) })
}
func MessageBody(length int) []byte {
	return ask(nil, func(d Double) []byte { return d.MessageBody(length) })
}
func NextMessage(timeoutMs int32) int32 {
	return ask(unavailable, func(d Double) int32 { return d.NextMessage(timeoutMs) })
}
func Reply(bytes []byte) int32 {
	return ask(unavailable, func(d Double) int32 { return d.Reply(bytes) })
}
func Log(level int32, line string) int32 {
	return ask(unavailable, func(d Double) int32 { return d.Log(level, line) })
}
func Config() int32  { return ask(unavailable, Double.Config) }
func ClockMs() int64 { return ask(0, Double.ClockMs) }
func TimerSet(name string, afterMs, everyMs int32) int32 {
	return ask(unavailable, func(d Double) int32 { return d.TimerSet(name, afterMs, everyMs) })
}
func TimerCancel(name string) int32 {
	return ask(unavailable, func(d Double) int32 { return d.TimerCancel(name) })
}
func StateGet(key string) int32 {
	return ask(unavailable, func(d Double) int32 { return d.StateGet(key) })
}
func StateSet(key string, value []byte) int32 {
	return ask(unavailable, func(d Double) int32 { return d.StateSet(key, value) })
}
func StateDelete(key string) int32 {
	return ask(unavailable, func(d Double) int32 { return d.StateDelete(key) })
}
func StateKeys(prefix string) int32 {
	return ask(unavailable, func(d Double) int32 { return d.StateKeys(prefix) })
}
func MetricAdd(name string, value float64) int32 {
	return ask(unavailable, func(d Double) int32 { return d.MetricAdd(name, value) })
}
func MetricSet(name string, value float64) int32 {
	return ask(unavailable, func(d Double) int32 { return d.MetricSet(name, value) })
}
func CacheStats() int32 { return ask(unavailable, Double.CacheStats) }
func CacheKeys(query []byte) int32 {
	return ask(unavailable, func(d Double) int32 { return d.CacheKeys(query) })
}
func CacheRequest(request []byte) int32 {
	return ask(unavailable, func(d Double) int32 { return d.CacheRequest(request) })
}
func EventsSubscribe(request []byte) int32 {
	return ask(unavailable, func(d Double) int32 { return d.EventsSubscribe(request) })
}
func HTTPRequest(request, body []byte) int32 {
	return ask(unavailable, func(d Double) int32 { return d.HTTPRequest(request, body) })
}
func HTTPBodyRead(into []byte) int32 {
	return ask(unavailable, func(d Double) int32 { return d.HTTPBodyRead(into) })
}
