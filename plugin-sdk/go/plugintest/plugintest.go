//go:build !wasip1

// Package plugintest is a double of the server, so that a plugin's tests run natively.
//
// A [Host] stands in for the server until the test ends; tests that use one cannot be parallel. Like the
// server it grants nothing that it was not told to. It records every call and every line of the log. A
// [Running] plugin gets messages as the server would send them; its clock moves only when
// [Running.Advance] moves it.
//
//	func TestBeat(t *testing.T) {
//		host := plugintest.New(t)
//		running, err := host.Start(&heartbeat{})
//		if err != nil {
//			t.Fatal(err)
//		}
//		if err := running.Advance(95 * time.Second); err != nil {
//			t.Fatal(err)
//		}
//		if got := len(host.LogLines()); got != 4 {
//			t.Errorf("%d beats", got)
//		}
//	}
package plugintest

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"stockade.dev/plugin"
	"stockade.dev/plugin/internal/abi"
)

// Grant is what a manifest can grant, the word of its cache list.
type Grant string

// The grants.
const (
	Stats    Grant = "stats"
	Keys     Grant = "keys"
	Events   Grant = "events"
	Pin      Grant = "pin"
	Evict    Grant = "evict"
	Prefetch Grant = "prefetch"
)

// Recorded is a call that the plugin made, but for those that only fetch what another one answered.
type Recorded struct {
	// Import is the name of the import, such as state_set.
	Import string
	// Arguments by name; those of an import that takes JSON are as that says.
	Arguments map[string]any
	// Result is 0 or more, or one of the codes of errors.
	Result int32
}

// Log is a line that the plugin logged.
type Log struct {
	Level plugin.Level
	Line  string
}

// Responder answers requests. Its error is the plugin's: a *plugin.Error keeps its code, any other is
// Unavailable, as for a host that is down.
type Responder func(*plugin.HTTPRequest) (status int, body []byte, err error)

type timer struct {
	name           string
	dueMs, everyMs int64
}

// Host is the double. Its exported fields may be set before the plugin starts and while it runs.
type Host struct {
	// Config holds the server's settings, of the shape of plugin.Config.
	Config map[string]any
	// StateKiB is the room for state.
	StateKiB int
	// State is what the plugin's state holds.
	State map[string][]byte
	// Stats are the statistics.
	Stats plugin.CacheStats
	// Keys are the objects.
	Keys []plugin.Key
	// SecondTier is what Prefetch finds; nil where there is no second tier.
	SecondTier []plugin.Key
	// HTTP answers requests; without it no address is granted.
	HTTP Responder
	// Counters and Gauges are the plugin's metrics.
	Counters, Gauges map[string]float64
	// Logs are the lines that the plugin logged, in order.
	Logs []Log
	// Calls are the calls that the plugin made, in order.
	Calls []Recorded
	// Subscription is what the plugin is subscribed to.
	Subscription *plugin.Subscription

	grants      map[Grant]bool
	nowMs       int64
	seq         uint64
	pins        map[string]int64
	timers      []timer
	messages    []plugin.Message
	message     []byte
	messageBody []byte
	wantsReply  bool
	reply       []byte
	hasReply    bool
	answer      []byte
	body        []byte
}

// New puts a server that grants nothing, with empty settings, in place until t ends.
func New(t testing.TB) *Host {
	host := &Host{
		Config:   map[string]any{},
		State:    map[string][]byte{},
		Counters: map[string]float64{},
		Gauges:   map[string]float64{},
		grants:   map[Grant]bool{},
		pins:     map[string]int64{},
		nowMs:    1_700_000_000_000,
	}
	abi.Install(double{host})
	t.Cleanup(func() { abi.Install(nil) })
	return host
}

// Grant grants more.
func (h *Host) Grant(grants ...Grant) *Host {
	for _, grant := range grants {
		h.grants[grant] = true
	}
	return h
}

// Setting sets a setting of plugins, as --runtime-plugin-config does.
func (h *Host) Setting(name string, value any) *Host {
	extra, ok := h.Config["runtime_plugin_extra_config"].(map[string]any)
	if !ok {
		extra = map[string]any{}
		h.Config["runtime_plugin_extra_config"] = extra
	}
	extra[name] = value
	return h
}

// LogLines are what the plugin logged, without levels.
func (h *Host) LogLines() []string {
	lines := make([]string, 0, len(h.Logs))
	for _, log := range h.Logs {
		lines = append(lines, log.Line)
	}
	return lines
}

// CallsOf are the arguments of the calls of one import, in order.
func (h *Host) CallsOf(name string) []map[string]any {
	var calls []map[string]any
	for _, call := range h.Calls {
		if call.Import == name {
			calls = append(calls, call.Arguments)
		}
	}
	return calls
}

// Pinned are the keys that are pinned now, in order.
func (h *Host) Pinned() []string {
	var keys []string
	for key, untilMs := range h.pins {
		if untilMs > h.nowMs {
			keys = append(keys, key)
		}
	}
	slices.Sort(keys)
	return keys
}

// Send puts a message into the queue that a command's NextMessage reads.
func (h *Host) Send(message plugin.Message) { h.messages = append(h.messages, message) }

// Reply is what a command replied to the message at hand, if it did.
func (h *Host) Reply() (reply []byte, ok bool) { return h.reply, h.hasReply }

// deliver keeps a message as the one at hand, as the server would send it; its length.
func (h *Host) deliver(message plugin.Message) int32 {
	h.seq++
	h.reply, h.hasReply, h.wantsReply, h.messageBody = nil, false, false, nil
	kind := "unknown"
	switch it := message.(type) {
	case *plugin.Start:
		kind, it.Seq = "start", h.seq
	case *plugin.Timer:
		kind, it.Seq = "timer", h.seq
	case *plugin.Shutdown:
		kind, it.Seq = "shutdown", h.seq
	case *plugin.EventBatch:
		kind, it.Seq = "events", h.seq
	case *plugin.Rank:
		kind, it.Seq, h.wantsReply = "rank", h.seq, true
	case *plugin.Call:
		kind, it.Seq, h.wantsReply = "call", h.seq, true
		it.BodyBytes, h.messageBody = uint64(len(it.Body)), it.Body
	case *plugin.Unknown:
		kind = it.Kind
	}
	fields := map[string]any{}
	text, err := json.Marshal(message)
	if err == nil {
		err = json.Unmarshal(text, &fields)
	}
	fields["kind"] = kind
	if err == nil {
		h.message, err = json.Marshal(fields)
	}
	if err != nil {
		panic(fmt.Sprintf("a message cannot be JSON: %v", err))
	}
	return int32(len(h.message))
}

// nextTimer is the timer that is due first, if it is due by untilMs; it moves the clock there.
func (h *Host) nextTimer(untilMs int64) *plugin.Timer {
	next := -1
	for i, timer := range h.timers {
		if timer.dueMs <= untilMs && (next < 0 || timer.dueMs < h.timers[next].dueMs) {
			next = i
		}
	}
	if next < 0 {
		return nil
	}
	due := h.timers[next]
	h.nowMs = max(h.nowMs, due.dueMs)
	if due.everyMs == 0 {
		h.timers = slices.Delete(h.timers, next, next+1)
	} else {
		h.timers[next].dueMs += due.everyMs
	}
	return &plugin.Timer{Name: due.name}
}

func refused(code plugin.ErrorCode, format string, args ...any) error {
	return &plugin.Error{Code: code, Message: fmt.Sprintf(format, args...)}
}

func (h *Host) granted(grant Grant) error {
	if h.grants[grant] {
		return nil
	}
	return refused(plugin.Denied, "not granted: add cache = [%q] to the plugin's manifest", grant)
}

func (h *Host) stateGranted() error {
	if h.StateKiB > 0 {
		return nil
	}
	return refused(plugin.Denied, "not granted: add state_kib = 64 to [limits] of the plugin's manifest")
}

func (h *Host) cacheRequest(text []byte) ([]byte, error) {
	var request struct {
		Op    string   `json:"op"`
		Keys  []string `json:"keys"`
		TTLMs int64    `json:"ttl_ms"`
	}
	if err := json.Unmarshal(text, &request); err != nil {
		return nil, refused(plugin.Invalid, "%v", err)
	}
	grants := map[string]Grant{"pin": Pin, "unpin": Pin, "evict": Evict, "prefetch": Prefetch}
	grant, ok := grants[request.Op]
	if !ok {
		return nil, refused(plugin.Invalid, "op `%s` is not known", request.Op)
	}
	if err := h.granted(grant); err != nil {
		return nil, err
	}
	if grant == Prefetch {
		if h.SecondTier == nil {
			return nil, refused(plugin.Unavailable, "there is no second tier: give it with SecondTier")
		}
		for _, key := range h.SecondTier {
			isHeld := slices.ContainsFunc(h.Keys, func(held plugin.Key) bool { return held.Key == key.Key })
			if slices.Contains(request.Keys, key.Key) && !isHeld {
				h.Keys = append(h.Keys, key)
			}
		}
	}
	var outcome plugin.Outcome
	for _, name := range request.Keys {
		index := slices.IndexFunc(h.Keys, func(key plugin.Key) bool { return key.Key == name })
		if index < 0 {
			outcome.Missing++
			continue
		}
		outcome.Done++
		switch request.Op {
		case "pin":
			h.pins[name] = h.nowMs + request.TTLMs
		case "unpin":
			delete(h.pins, name)
		case "evict":
			h.Keys = slices.Delete(h.Keys, index, index+1)
		}
	}
	return json.Marshal(outcome)
}

func (h *Host) cacheKeys(text []byte) ([]byte, error) {
	if err := h.granted(Keys); err != nil {
		return nil, err
	}
	var query plugin.KeyQuery
	if err := json.Unmarshal(text, &query); err != nil {
		return nil, refused(plugin.Invalid, "%v", err)
	}
	limit := 100
	if query.Limit > 0 {
		limit = int(query.Limit)
	}
	page := plugin.KeyPage{Keys: []plugin.Key{}}
	for _, key := range slices.SortedFunc(slices.Values(h.Keys), func(a, b plugin.Key) int {
		return strings.Compare(a.Key, b.Key)
	}) {
		parts := append(strings.Split(key.Key, "@"), "", "", "", "", "")
		if key.Key <= query.After || (query.Model != "" && query.Model != parts[0]) ||
			(query.Salt != nil && *query.Salt != parts[4]) {
			continue
		}
		if len(page.Keys) == limit {
			page.Next = &page.Keys[limit-1].Key
			break
		}
		page.Keys = append(page.Keys, key)
	}
	return json.Marshal(page)
}

// double is the host as the imports see it, so that these are no methods of a Host.
type double struct{ *Host }

// settled keeps an answer or a reason; the call's result.
func (d double) settled(answer []byte, err error) int32 {
	if err == nil {
		d.answer = answer
		return int32(len(answer))
	}
	refusal, ok := err.(*plugin.Error)
	if !ok {
		refusal = &plugin.Error{Code: plugin.Unavailable, Message: err.Error()}
	}
	d.answer = []byte(refusal.Message)
	return int32(refusal.Code)
}

func (d double) recorded(name string, arguments map[string]any, answer []byte, err error) int32 {
	result := d.settled(answer, err)
	d.Calls = append(d.Calls, Recorded{name, arguments, result})
	return result
}

func object(text []byte) map[string]any {
	fields := map[string]any{}
	if err := json.Unmarshal(text, &fields); err != nil {
		fields["text"] = string(text)
	}
	return fields
}

func head(bytes []byte, length int) []byte { return slices.Clone(bytes[:min(length, len(bytes))]) }

func (d double) Answer(length int) []byte      { return head(d.answer, length) }
func (d double) AnswerLength() int32           { return int32(len(d.answer)) }
func (d double) Message(length int) []byte     { return head(d.message, length) }
func (d double) MessageBody(length int) []byte { return head(d.messageBody, length) }

func (d double) NextMessage(timeoutMs int32) int32 {
	if len(d.messages) > 0 {
		message := d.messages[0]
		d.messages = d.messages[1:]
		return d.deliver(message)
	}
	// Nobody else moves this clock, so waiting is jumping to what comes next.
	untilMs := d.nowMs + int64(timeoutMs)
	if timeoutMs < 0 {
		untilMs = 1 << 62
	}
	if timer := d.nextTimer(untilMs); timer != nil {
		return d.deliver(timer)
	}
	if timeoutMs < 0 {
		return d.settled(nil, refused(plugin.Unavailable, "nothing would ever come: send the double a message first"))
	}
	d.nowMs = untilMs
	return 0
}

func (d double) Reply(bytes []byte) int32 {
	var err error
	if d.wantsReply {
		d.wantsReply, d.reply, d.hasReply = false, slices.Clone(bytes), true
	} else {
		err = refused(plugin.State, "no message waits for a reply")
	}
	return d.recorded("reply", map[string]any{"text": string(bytes)}, nil, err)
}

func (d double) Log(level int32, line string) int32 {
	d.Logs = append(d.Logs, Log{plugin.Level(level), line})
	return 0
}

func (d double) Config() int32 {
	text, err := json.Marshal(d.Host.Config)
	return d.recorded("config", nil, text, err)
}

func (d double) ClockMs() int64 { return d.nowMs }

func (d double) TimerSet(name string, afterMs, everyMs int32) int32 {
	var err error
	if name == "" || afterMs < 0 || everyMs < 0 {
		err = refused(plugin.Invalid, "a timer has a name, and no time below 0")
	} else {
		d.timers = slices.DeleteFunc(d.timers, func(timer timer) bool { return timer.name == name })
		d.timers = append(d.timers, timer{name, d.nowMs + int64(afterMs), int64(everyMs)})
	}
	arguments := map[string]any{"name": name, "after_ms": afterMs, "every_ms": everyMs}
	return d.recorded("timer_set", arguments, nil, err)
}

func (d double) TimerCancel(name string) int32 {
	before := len(d.timers)
	d.timers = slices.DeleteFunc(d.timers, func(timer timer) bool { return timer.name == name })
	var err error
	if len(d.timers) == before {
		err = refused(plugin.NotFound, "there is no timer `%s`", name)
	}
	return d.recorded("timer_cancel", map[string]any{"name": name}, nil, err)
}

func (d double) state(key string) ([]byte, error) {
	if err := d.stateGranted(); err != nil {
		return nil, err
	}
	value, ok := d.State[key]
	if !ok {
		return nil, refused(plugin.NotFound, "there is no state `%s`", key)
	}
	return value, nil
}

func (d double) StateGet(key string) int32 {
	value, err := d.state(key)
	return d.recorded("state_get", map[string]any{"key": key}, slices.Clone(value), err)
}

func (d double) StateSet(key string, value []byte) int32 {
	err := d.stateGranted()
	if err == nil {
		used := len(key) + len(value)
		for held, value := range d.State {
			if held != key {
				used += len(held) + len(value)
			}
		}
		if used > d.StateKiB*1024 {
			err = refused(plugin.Limit, "the state would exceed state_kib of the plugin's manifest")
		} else {
			d.State[key] = slices.Clone(value)
		}
	}
	return d.recorded("state_set", map[string]any{"key": key, "value": string(value)}, nil, err)
}

func (d double) StateDelete(key string) int32 {
	_, err := d.state(key)
	if err == nil {
		delete(d.State, key)
	}
	return d.recorded("state_delete", map[string]any{"key": key}, nil, err)
}

func (d double) StateKeys(prefix string) int32 {
	err := d.stateGranted()
	keys := []string{}
	for _, key := range slices.Sorted(maps.Keys(d.State)) {
		if strings.HasPrefix(key, prefix) {
			keys = append(keys, key)
		}
	}
	text, marshalErr := json.Marshal(keys)
	if err == nil {
		err = marshalErr
	}
	return d.recorded("state_keys", map[string]any{"prefix": prefix}, text, err)
}

func (d double) MetricAdd(name string, value float64) int32 {
	var err error
	if value >= 0 {
		d.Counters[name] += value
	} else {
		err = refused(plugin.Invalid, "value %v: a counter only grows", value)
	}
	return d.recorded("metric_add", map[string]any{"name": name, "value": value}, nil, err)
}

func (d double) MetricSet(name string, value float64) int32 {
	d.Gauges[name] = value
	return d.recorded("metric_set", map[string]any{"name": name, "value": value}, nil, nil)
}

func (d double) CacheStats() int32 {
	text, err := json.Marshal(d.Stats)
	if denied := d.granted(Stats); denied != nil {
		err = denied
	}
	return d.recorded("cache_stats", nil, text, err)
}

func (d double) CacheKeys(query []byte) int32 {
	page, err := d.cacheKeys(query)
	return d.recorded("cache_keys", object(query), page, err)
}

func (d double) CacheRequest(request []byte) int32 {
	outcome, err := d.cacheRequest(request)
	return d.recorded("cache_request", object(request), outcome, err)
}

func (d double) EventsSubscribe(request []byte) int32 {
	err := d.granted(Events)
	var wanted plugin.Subscription
	if err == nil {
		err = json.Unmarshal(request, &wanted)
	}
	answer := []byte(`{"cursor":0}`)
	if err == nil {
		d.Subscription = &wanted
		if wanted.Cursor != nil {
			answer = fmt.Appendf(nil, `{"cursor":%d}`, *wanted.Cursor)
		}
	}
	return d.recorded("events_subscribe", object(request), answer, err)
}

func (d double) HTTPRequest(text, body []byte) int32 {
	arguments := object(text)
	if len(body) > 0 {
		arguments["body"] = string(body)
	}
	head, err := d.respond(text, body)
	return d.recorded("http_request", arguments, head, err)
}

func (d double) respond(text, body []byte) ([]byte, error) {
	request := &plugin.HTTPRequest{}
	if err := json.Unmarshal(text, request); err != nil {
		return nil, refused(plugin.Invalid, "%v", err)
	}
	request.Body = slices.Clone(body)
	if d.HTTP == nil {
		return nil, refused(plugin.Denied,
			"%s is not granted: add an [[http]] table to the plugin's manifest", request.URL)
	}
	status, answer, err := d.HTTP(request)
	if err != nil {
		return nil, err
	}
	d.body = slices.Clone(answer)
	return json.Marshal(plugin.HTTPResponse{
		Status: status, Headers: map[string]string{}, BodyBytes: uint64(len(answer)),
	})
}

func (d double) HTTPBodyRead(into []byte) int32 {
	n := copy(into, d.body)
	d.body = d.body[n:]
	return int32(n)
}

var _ abi.Double = double{}

// Start starts a reactor; the error is what its Start returns.
func (h *Host) Start(p plugin.Plugin) (*Running, error) {
	running := &Running{host: h, plugin: p}
	return running, running.handle(&plugin.Start{Plugin: "under_test", ABI: 1, Server: "0.1.0"})
}

// Advance moves the clock and hands over the timers that come due, each at its time. After an error those
// that follow are still to come.
func (r *Running) Advance(d time.Duration) error {
	untilMs := r.host.nowMs + d.Milliseconds()
	for {
		timer := r.host.nextTimer(untilMs)
		if timer == nil {
			r.host.nowMs = untilMs
			return nil
		}
		if err := r.handle(timer); err != nil {
			return err
		}
	}
}
