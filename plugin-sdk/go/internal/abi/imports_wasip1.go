// Package abi has the imports of stockade:plugin/v1, one function each, without the pointers.
//
// Results are as the contract has them: at least 0 is success, below 0 a code. On other systems than
// wasip1 the same functions ask the double that package plugintest installs.
package abi

//go:wasmimport stockade:plugin/v1 answer_read
func answerRead(ptr *byte, length int32) int32

//go:wasmimport stockade:plugin/v1 answer_length
func answerLength() int32

//go:wasmimport stockade:plugin/v1 message_read
func messageRead(ptr *byte, length int32) int32

//go:wasmimport stockade:plugin/v1 message_body_read
func messageBodyRead(ptr *byte, length int32) int32

//go:wasmimport stockade:plugin/v1 next_message
func nextMessage(timeoutMs int32) int32

//go:wasmimport stockade:plugin/v1 reply
func reply(ptr *byte, length int32) int32

//go:wasmimport stockade:plugin/v1 log
func log(level int32, line string) int32

//go:wasmimport stockade:plugin/v1 config
func config() int32

//go:wasmimport stockade:plugin/v1 clock_ms
func clockMs() int64

//go:wasmimport stockade:plugin/v1 timer_set
func timerSet(name string, afterMs, everyMs int32) int32

//go:wasmimport stockade:plugin/v1 timer_cancel
func timerCancel(name string) int32

//go:wasmimport stockade:plugin/v1 state_get
func stateGet(key string) int32

//go:wasmimport stockade:plugin/v1 state_set
func stateSet(key string, ptr *byte, length int32) int32

//go:wasmimport stockade:plugin/v1 state_delete
func stateDelete(key string) int32

//go:wasmimport stockade:plugin/v1 state_keys
func stateKeys(prefix string) int32

//go:wasmimport stockade:plugin/v1 metric_add
func metricAdd(name string, value float64) int32

//go:wasmimport stockade:plugin/v1 metric_set
func metricSet(name string, value float64) int32

//go:wasmimport stockade:plugin/v1 cache_stats
func cacheStats() int32

//go:wasmimport stockade:plugin/v1 cache_keys
func cacheKeys(ptr *byte, length int32) int32

//go:wasmimport stockade:plugin/v1 cache_request
func cacheRequest(ptr *byte, length int32) int32

//go:wasmimport stockade:plugin/v1 events_subscribe
func eventsSubscribe(ptr *byte, length int32) int32

//go:wasmimport stockade:plugin/v1 http_request
func httpRequest(ptr *byte, length int32, body *byte, bodyLength int32) int32

//go:wasmimport stockade:plugin/v1 http_body_read
func httpBodyRead(ptr *byte, length int32) int32

// at is where bytes begin; nothing is read or written there where they are none.
func at(bytes []byte) *byte {
	if len(bytes) == 0 {
		return new(byte)
	}
	return &bytes[0]
}

// filled is a slice of length bytes, shorter where the server has less.
func filled(length int, read func(*byte, int32) int32) []byte {
	bytes := make([]byte, max(length, 0))
	copied := read(at(bytes), int32(len(bytes)))
	return bytes[:min(max(int(copied), 0), len(bytes))]
}

func Answer(length int) []byte      { return filled(length, answerRead) }
func Message(length int) []byte     { return filled(length, messageRead) }
func MessageBody(length int) []byte { return filled(length, messageBodyRead) }

func AnswerLength() int32               { return answerLength() }
func NextMessage(timeoutMs int32) int32 { return nextMessage(timeoutMs) }
func Reply(bytes []byte) int32          { return reply(at(bytes), int32(len(bytes))) }
func Log(level int32, line string) int32 {
	return log(level, line)
}
func Config() int32  { return config() }
func ClockMs() int64 { return clockMs() }
func TimerSet(name string, afterMs, everyMs int32) int32 {
	return timerSet(name, afterMs, everyMs)
}
func TimerCancel(name string) int32 { return timerCancel(name) }
func StateGet(key string) int32     { return stateGet(key) }
func StateSet(key string, value []byte) int32 {
	return stateSet(key, at(value), int32(len(value)))
}
func StateDelete(key string) int32               { return stateDelete(key) }
func StateKeys(prefix string) int32              { return stateKeys(prefix) }
func MetricAdd(name string, value float64) int32 { return metricAdd(name, value) }
func MetricSet(name string, value float64) int32 { return metricSet(name, value) }
func CacheStats() int32                          { return cacheStats() }
func CacheKeys(query []byte) int32               { return cacheKeys(at(query), int32(len(query))) }
func CacheRequest(request []byte) int32          { return cacheRequest(at(request), int32(len(request))) }
func EventsSubscribe(request []byte) int32       { return eventsSubscribe(at(request), int32(len(request))) }
func HTTPBodyRead(into []byte) int32             { return httpBodyRead(at(into), int32(len(into))) }
func HTTPRequest(request, body []byte) int32 {
	return httpRequest(at(request), int32(len(request)), at(body), int32(len(body)))
}
