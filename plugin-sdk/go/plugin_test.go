package plugin_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"stockade.dev/plugin"
	"stockade.dev/plugin/plugintest"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func refused(t *testing.T, err error, code plugin.ErrorCode, says string) {
	t.Helper()
	if !errors.Is(err, code) || !strings.Contains(err.Error(), says) {
		t.Errorf("%v is not %v with %q", err, code, says)
	}
}

// everything uses every handler.
type everything struct{ seen []string }

func (e *everything) Start(start *plugin.Start) error {
	e.seen = append(e.seen, fmt.Sprintf("start %d %d", start.Seq, start.ABI))
	cursor := uint64(7)
	_, err := plugin.Subscribe(plugin.Subscription{
		Types: []plugin.EventType{plugin.Lookup, plugin.SessionEnd}, Cursor: &cursor,
	})
	return errors.Join(err,
		plugin.EveryAfter("tick", 2*time.Second, 2*time.Second), plugin.Once("late", 5*time.Second))
}

func (e *everything) Timer(timer *plugin.Timer) error {
	e.seen = append(e.seen, fmt.Sprintf("%s at %d", timer.Name, plugin.Now().UnixMilli()%100_000))
	if timer.Name == "late" {
		_, err := plugin.CancelTimer("tick")
		return err
	}
	return nil
}

func (e *everything) Events(batch *plugin.EventBatch) error {
	e.seen = append(e.seen, fmt.Sprintf("%d to %d, %d lost", len(batch.Events), batch.Cursor, batch.Lost))
	return nil
}

func (e *everything) Shutdown(shutdown *plugin.Shutdown) error {
	plugin.Warnf("%d ms left", shutdown.GraceMs)
	return nil
}

func (e *everything) Call(call *plugin.Call) ([]byte, error) {
	switch call.Name() {
	case "seen":
		return []byte(strings.Join(e.seen, "\n")), nil
	case "echo":
		return call.Body, nil
	}
	return nil, fmt.Errorf("no method `%s`", call.Name())
}

func (e *everything) Rank(rank *plugin.Rank) ([]uint32, error) {
	var order []uint32
	for _, candidate := range slices.SortedFunc(slices.Values(rank.Candidates), func(a, b plugin.Candidate) int {
		return int(b.Bytes) - int(a.Bytes)
	}) {
		order = append(order, candidate.ID)
	}
	return order, nil
}

func TestEveryHandlerGetsWhatTheServerSends(t *testing.T) {
	host := plugintest.New(t).Grant(plugintest.Events)
	running, err := host.Start(&everything{})
	must(t, err)
	if cursor := host.Subscription.Cursor; cursor == nil || *cursor != 7 {
		t.Errorf("subscribed from %v", cursor)
	}
	must(t, running.Advance(9*time.Second))
	lookup := plugin.Event{Type: plugin.Lookup, Model: "m", Request: "r", Tokens: 512, HitTokens: 256}
	must(t, running.Events(lookup, lookup))
	must(t, running.EventsAfterLoss(3, lookup))
	seen, err := running.Call("it.seen", nil)
	must(t, err)
	want := "start 1 1\ntick at 2000\ntick at 4000\nlate at 5000\n2 to 2, 0 lost\n1 to 6, 3 lost"
	if string(seen) != want {
		t.Errorf("seen %q", seen)
	}
	// Raw bytes pass as they are.
	raw := []byte{0, 255, 128, 10}
	echo, err := running.Call("it.echo", raw)
	must(t, err)
	if !bytes.Equal(echo, raw) {
		t.Errorf("echo %v", echo)
	}
	if _, err := running.Call("it.other", nil); err == nil || err.Error() != "no method `other`" {
		t.Errorf("another method: %v", err)
	}
	order, err := running.Rank(plugin.Candidate{ID: 0, Bytes: 1}, plugin.Candidate{ID: 1, Bytes: 3},
		plugin.Candidate{ID: 2, Bytes: 2})
	must(t, err)
	if !slices.Equal(order, []uint32{1, 2, 0}) {
		t.Errorf("order %v", order)
	}
	must(t, running.Shutdown())
	if !slices.Equal(host.Logs, []plugintest.Log{{Level: plugin.LevelWarn, Line: "5000 ms left"}}) {
		t.Errorf("logs %v", host.Logs)
	}
}

// quiet handles nothing but its start.
type quiet struct{}

func (quiet) Start(*plugin.Start) error { return plugin.Every("tick", time.Second) }

func TestWhatAPluginDoesNotHandleIsLeftAloneOrRefused(t *testing.T) {
	running, err := plugintest.New(t).Start(quiet{})
	must(t, err)
	must(t, running.Advance(3*time.Second))
	must(t, running.Events(plugin.Event{Type: plugin.Stored}))
	must(t, running.Shutdown())
	if _, err := running.Call("it.x", nil); err == nil {
		t.Error("a call of nobody succeeded")
	}
	if _, err := running.Rank(plugin.Candidate{}); err == nil {
		t.Error("a ranking of nobody succeeded")
	}
}

func TestNothingIsGrantedThatWasNotAskedFor(t *testing.T) {
	_, err := plugintest.New(t).Start(&everything{})
	refused(t, err, plugin.Denied, `cache = ["events"]`)
	_, err = plugin.Stats()
	refused(t, err, plugin.Denied, "stats")
	_, err = plugin.Keys(plugin.KeyQuery{})
	refused(t, err, plugin.Denied, "keys")
	_, err = plugin.Pin(time.Second, "k")
	refused(t, err, plugin.Denied, "pin")
	_, err = plugin.Evict("k")
	refused(t, err, plugin.Denied, "evict")
	_, err = plugin.Prefetch("k")
	refused(t, err, plugin.Denied, "prefetch")
	_, _, err = plugin.GetState("k")
	refused(t, err, plugin.Denied, "state_kib")
	_, err = plugin.Get("http://nobody/")
	refused(t, err, plugin.Denied, "[[http]]")
}

func TestAPrefetchFindsWhatTheSecondTierHas(t *testing.T) {
	host := plugintest.New(t).Grant(plugintest.Prefetch, plugintest.Keys)
	_, err := plugin.Prefetch("a")
	refused(t, err, plugin.Unavailable, "SecondTier")
	host.Keys = []plugin.Key{{Key: "b"}}
	host.SecondTier = []plugin.Key{{Key: "a"}, {Key: "b"}, {Key: "c"}}
	outcome, err := plugin.Prefetch("a", "b", "x")
	if err != nil || outcome.Done != 2 || outcome.Missing != 1 {
		t.Errorf("%+v, %v", outcome, err)
	}
	page, err := plugin.Keys(plugin.KeyQuery{})
	if err != nil || len(page.Keys) != 2 || page.Keys[0].Key != "a" || page.Keys[1].Key != "b" {
		t.Errorf("%+v, %v", page, err)
	}
}

func TestWithoutADoubleCallsSayWhatIsMissing(t *testing.T) {
	_, _, err := plugin.GetState("k")
	refused(t, err, plugin.Unavailable, "plugintest.New")
}

func TestStateIsKeptWithinItsLimit(t *testing.T) {
	host := plugintest.New(t)
	host.StateKiB = 1
	if _, ok, err := plugin.GetState("a"); ok || err != nil {
		t.Errorf("there is %v, %v", ok, err)
	}
	must(t, plugin.SetState("a", []byte{0, 255}))
	if value, ok, err := plugin.GetState("a"); !ok || err != nil || !bytes.Equal(value, []byte{0, 255}) {
		t.Errorf("%v, %v, %v", value, ok, err)
	}
	must(t, plugin.SetStateJSON("ab", map[string]int{"n": 1}))
	kept := map[string]int{}
	if ok, err := plugin.GetStateJSON("ab", &kept); !ok || err != nil || kept["n"] != 1 {
		t.Errorf("%v, %v, %v", kept, ok, err)
	}
	var number int
	_, err := plugin.GetStateJSON("ab", &number)
	refused(t, err, plugin.Invalid, "state `ab`")
	keys, err := plugin.StateKeys("a")
	must(t, err)
	if !slices.Equal(keys, []string{"a", "ab"}) {
		t.Errorf("keys %v", keys)
	}
	refused(t, plugin.SetState("big", make([]byte, 1024)), plugin.Limit, "state_kib")
	for _, want := range []bool{true, false} {
		if was, err := plugin.DeleteState("a"); was != want || err != nil {
			t.Errorf("deleted %v, %v", was, err)
		}
	}
	if calls := host.CallsOf("state_delete"); len(host.State) != 1 || len(calls) != 2 {
		t.Errorf("%v after %v", host.State, calls)
	}
}

func TestKeysAreListedInPagesPinnedAndEvicted(t *testing.T) {
	host := plugintest.New(t).Grant(plugintest.Keys, plugintest.Pin, plugintest.Evict)
	host.Keys = []plugin.Key{{Key: "m@0@0@b", Bytes: 4096}, {Key: "m@0@0@a"}, {Key: "n@0@0@c@salt"}}
	page, err := plugin.Keys(plugin.KeyQuery{Limit: 2})
	must(t, err)
	if page.Next == nil || *page.Next != "m@0@0@b" || page.Keys[1].Bytes != 4096 {
		t.Fatalf("page %+v", page)
	}
	page, err = plugin.Keys(plugin.KeyQuery{Limit: 2, After: *page.Next})
	must(t, err)
	if len(page.Keys) != 1 || page.Next != nil {
		t.Errorf("page %+v", page)
	}
	salt := "salt"
	if page, err = plugin.Keys(plugin.KeyQuery{Salt: &salt}); err != nil || len(page.Keys) != 1 {
		t.Errorf("page %+v, %v", page, err)
	}
	if outcome, err := plugin.Pin(time.Minute, "m@0@0@a", "gone"); err != nil || outcome.Done != 1 || outcome.Missing != 1 {
		t.Errorf("%+v, %v", outcome, err)
	}
	if !slices.Equal(host.Pinned(), []string{"m@0@0@a"}) {
		t.Errorf("pinned %v", host.Pinned())
	}
	if outcome, err := plugin.Unpin("m@0@0@a"); err != nil || outcome.Done != 1 || len(host.Pinned()) != 0 {
		t.Errorf("%+v, %v", outcome, err)
	}
	if outcome, err := plugin.Evict("m@0@0@b"); err != nil || outcome.Done != 1 || len(host.Keys) != 2 {
		t.Errorf("%+v, %v", outcome, err)
	}
}

func TestHTTPGivesHeadsAndBodies(t *testing.T) {
	host := plugintest.New(t)
	large := bytes.Repeat([]byte{7}, 200_000)
	host.HTTP = func(request *plugin.HTTPRequest) (int, []byte, error) {
		if strings.HasSuffix(request.URL, "/down") {
			return 0, nil, errors.New("refused")
		}
		if request.Method != "POST" || request.Headers["a"] != "b" || !bytes.Equal(request.Body, []byte{255}) {
			t.Errorf("request %+v", request)
		}
		return 404, large, nil
	}
	response, err := (&plugin.HTTPRequest{
		Method: "POST", URL: "http://host/up", Headers: map[string]string{"a": "b"}, TimeoutMs: 1500, Body: []byte{255},
	}).Send()
	must(t, err)
	if response.IsSuccess() || response.BodyBytes != 200_000 {
		t.Errorf("response %+v", response)
	}
	body, err := response.Body()
	must(t, err)
	if !bytes.Equal(body, large) {
		t.Errorf("%d bytes", len(body))
	}
	if timeout := host.CallsOf("http_request")[0]["timeout_ms"]; timeout != 1500.0 {
		t.Errorf("timeout %v", timeout)
	}
	_, err = plugin.Get("http://host/down")
	refused(t, err, plugin.Unavailable, "refused")
}

func TestMetricsAreCountersAndGauges(t *testing.T) {
	host := plugintest.New(t)
	must(t, plugin.AddMetric("done", 1))
	must(t, plugin.AddMetric("done", 1.5))
	must(t, plugin.SetMetric("level", -3))
	if host.Counters["done"] != 2.5 || host.Gauges["level"] != -3 {
		t.Errorf("%v %v", host.Counters, host.Gauges)
	}
	refused(t, plugin.AddMetric("done", -1), plugin.Invalid, "only grows")
}

func TestLMCachesOwnConfigurationIsRead(t *testing.T) {
	text, err := os.ReadFile("../abi/lmcache-0.5.6-config.json")
	must(t, err)
	config, err := plugin.ParseConfig(text)
	must(t, err)
	if config.MP.Port != 15602 || config.MP.ChunkSize != 256 || config.HTTP.Port != 15612 ||
		config.StorageManager.L1Manager.Memory.SizeInBytes != 1<<30 ||
		config.StorageManager.Eviction.Policy != "LRU" || config.Obs.LookupHashLog.MaxFiles != 100 {
		t.Errorf("config %+v", config)
	}
	var url string
	must(t, config.Required("plugin.frontend.heartbeat_url", &url))
	if url != "http://127.0.0.1:5000/heartbeat" {
		t.Errorf("url %q", url)
	}
	if n, err := config.Seconds("n", 0.5, 2, 0); n != time.Second || err != nil {
		t.Errorf("%v, %v", n, err)
	}
}

func TestASettingThatCannotBeUsedIsNamed(t *testing.T) {
	plugintest.New(t).Setting("p.seconds", 0).Setting("p.name", 7).Setting("p.huge", 1e300).Setting("p.null", nil)
	config, err := plugin.LoadConfig()
	must(t, err)
	_, err = config.Seconds("p.seconds", 0.1, 10, 0)
	refused(t, err, plugin.Invalid, "setting `p.seconds` is 0: give seconds from 0.1 to 10")
	_, err = config.Seconds("p.huge", 0.1, 1e301, 0)
	refused(t, err, plugin.Invalid, "p.huge")
	var text string
	_, err = config.Setting("p.name", &text)
	refused(t, err, plugin.Invalid, "`p.name`")
	if ok, err := config.Setting("p.null", &text); ok || err != nil {
		t.Errorf("null is %v, %v", ok, err)
	}
	refused(t, config.Required("p.none", &text), plugin.NotFound, "--runtime-plugin-config")
	if otherwise, err := config.Seconds("p.none", 0, 1, time.Minute); otherwise != time.Minute || err != nil {
		t.Errorf("%v, %v", otherwise, err)
	}
	for _, text := range []string{"[]", "{", "null", `{"mp_config": {"port": "x"}}`} {
		_, err := plugin.ParseConfig([]byte(text))
		refused(t, err, plugin.Invalid, "configuration")
	}
}

func TestACommandWaitsForMessages(t *testing.T) {
	host := plugintest.New(t)
	if message, err := plugin.NextMessage(time.Second); message != nil || err != nil {
		t.Fatalf("%v, %v", message, err)
	}
	host.Send(&plugin.Call{Method: "it.x", Body: []byte("payload")})
	message, err := plugin.NextMessage(-1)
	must(t, err)
	call, ok := message.(*plugin.Call)
	if !ok || call.Name() != "x" || string(call.Body) != "payload" {
		t.Fatalf("message %+v", message)
	}
	must(t, plugin.Reply([]byte("done")))
	if reply, ok := host.Reply(); !ok || string(reply) != "done" {
		t.Errorf("reply %q", reply)
	}
	refused(t, plugin.Reply(nil), plugin.State, "no message")
	must(t, plugin.Once("soon", 3*time.Second))
	before := plugin.Now()
	message, err = plugin.NextMessage(-1)
	must(t, err)
	if timer, ok := message.(*plugin.Timer); !ok || timer.Name != "soon" || plugin.Now().Sub(before) != 3*time.Second {
		t.Errorf("message %+v after %v", message, plugin.Now().Sub(before))
	}
	host.Send(&plugin.Unknown{Kind: "weather"})
	message, err = plugin.NextMessage(-1)
	must(t, err)
	if unknown, ok := message.(*plugin.Unknown); !ok || unknown.Kind != "weather" {
		t.Errorf("message %+v", message)
	}
}
