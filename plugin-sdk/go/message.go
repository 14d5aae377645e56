package plugin

import (
	"strings"
	"time"

	"stockade.dev/plugin/internal/abi"
)

// Message is one of *Start, *Timer, *EventBatch, *Call, *Rank, *Shutdown and *Unknown.
type Message interface{ isMessage() }

// Start is the first message.
type Start struct {
	Seq    uint64  `json:"seq"`    // number of the message in this run
	Plugin string  `json:"plugin"` // the plugin's name
	ABI    uint32  `json:"abi"`    // version of the contract that the server speaks with it
	Server string  `json:"server"` // version of the server
	Tenant *string `json:"tenant"` // the tenant that the plugin belongs to, if it does
}

// Timer is a timer that is due.
type Timer struct {
	Seq   uint64 `json:"seq"`    // number of the message in this run
	Name  string `json:"name"`   // its name
	LagMs uint64 `json:"lag_ms"` // how late it is
}

// Shutdown is the request to end.
type Shutdown struct {
	Seq     uint64 `json:"seq"`      // number of the message in this run
	GraceMs uint64 `json:"grace_ms"` // until the plugin is ended by force
}

// Call is a call of an LMCache client (server_module_call) or of an operator.
type Call struct {
	Seq       uint64 `json:"seq"`        // number of the message in this run
	Method    string `json:"method"`     // <plugin>.<method>
	CacheSalt string `json:"cache_salt"` // the salt of the caller
	Caller    string `json:"caller"`     // zmq for a client, http for an operator
	BodyBytes uint64 `json:"body_bytes"` // length of the payload
	Body      []byte `json:"-"`          // the payload
}

// Name is the method without the plugin's name before it.
func (c *Call) Name() string {
	if _, name, ok := strings.Cut(c.Method, "."); ok {
		return name
	}
	return c.Method
}

// EventBatch holds the events since the last batch.
type EventBatch struct {
	Seq    uint64  `json:"seq"`    // number of the message in this run
	Cursor uint64  `json:"cursor"` // number of the last event, to subscribe from later
	Lost   uint64  `json:"lost"`   // events before it that were dropped because the plugin was behind
	Events []Event `json:"events"` // in the order in which they happened
}

// Event is something that happened in the cache. Fields that its type does not have are empty.
type Event struct {
	Type      EventType `json:"type"`
	Key       string    `json:"key,omitempty"`        // stored, retrieved, evicted
	Salt      string    `json:"salt"`                 // all
	Model     string    `json:"model"`                // all
	Bytes     uint64    `json:"bytes,omitempty"`      // stored, retrieved, evicted
	Request   string    `json:"request,omitempty"`    // all but evicted
	Tokens    uint64    `json:"tokens,omitempty"`     // stored: that it holds; lookup: that were asked for
	HitTokens uint64    `json:"hit_tokens,omitempty"` // lookup
	Why       string    `json:"why,omitempty"`        // evicted, such as pressure
}

// Rank asks for the order of candidates for eviction. All of them may go.
type Rank struct {
	Seq         uint64      `json:"seq"`          // number of the message in this run
	Tenant      string      `json:"tenant"`       // whose objects they are
	BytesWanted uint64      `json:"bytes_wanted"` // that must go now
	DeadlineMs  uint64      `json:"deadline_ms"`  // after which the server goes on without an answer
	Candidates  []Candidate `json:"candidates"`   // in the native policy's order, first to go first
}

// Candidate is an object that may be evicted.
type Candidate struct {
	ID      uint32 `json:"id"`      // what the order names it by
	Key     string `json:"key"`     // its key
	Salt    string `json:"salt"`    // its salt
	Model   string `json:"model"`   // its model
	Bytes   uint64 `json:"bytes"`   // its size
	Chunk   uint64 `json:"chunk"`   // its place in the prompt of the request that used it last, from 0; 0 too where it is not known
	IdleMs  uint64 `json:"idle_ms"` // milliseconds since it was last asked for
	AgeMs   uint64 `json:"age_ms"`  // milliseconds since it was stored
	Uses    uint64 `json:"uses"`    // how often it was asked for
	Request string `json:"request"` // the last request that ended after using it; empty where there is none
}

// Unknown is what a newer server may send; it can be left alone.
type Unknown struct {
	Kind string `json:"kind"`
}

func (*Start) isMessage()      {}
func (*Timer) isMessage()      {}
func (*Shutdown) isMessage()   {}
func (*Call) isMessage()       {}
func (*EventBatch) isMessage() {}
func (*Rank) isMessage()       {}
func (*Unknown) isMessage()    {}

// ReadMessage is the message of n bytes that is at hand. For package reactor; commands use NextMessage.
func ReadMessage(n int) (Message, error) {
	text := abi.Message(n)
	kind := &Unknown{}
	if err := parsed(text, kind, "a message"); err != nil {
		return nil, err
	}
	var message Message
	switch kind.Kind {
	case "start":
		message = &Start{}
	case "timer":
		message = &Timer{}
	case "shutdown":
		message = &Shutdown{}
	case "call":
		message = &Call{}
	case "events":
		message = &EventBatch{}
	case "rank":
		message = &Rank{}
	default:
		return kind, nil
	}
	if err := parsed(text, message, "a message"); err != nil {
		return nil, err
	}
	if call, ok := message.(*Call); ok {
		call.Body = abi.MessageBody(int(call.BodyBytes))
	}
	return message, nil
}

// NextMessage waits for the next message, at most timeout, without end where it is negative; nil when
// the time is over. No goroutine runs meanwhile. For commands only: a reactor's handlers are called
// instead, and it is State there.
func NextMessage(timeout time.Duration) (Message, error) {
	timeoutMs := int32(-1)
	if timeout >= 0 {
		timeoutMs = milliseconds(timeout)
	}
	n, err := length(abi.NextMessage(timeoutMs))
	if err != nil || n == 0 {
		return nil, err
	}
	return ReadMessage(n)
}

// Reply replies to the Call at hand; it is State when nothing waits for a reply. For commands: what a
// reactor's handler returns is its reply.
func Reply(reply []byte) error { return done(abi.Reply(reply)) }

// ReplyOrder replies to the Rank at hand with the IDs of candidates, first to go first. For commands.
func ReplyOrder(ids []uint32) error {
	if ids == nil {
		ids = []uint32{}
	}
	text, err := written(ids)
	if err != nil {
		return err
	}
	return Reply(text)
}
