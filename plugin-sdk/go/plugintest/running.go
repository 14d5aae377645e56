//go:build !wasip1

package plugintest

import (
	"encoding/json"
	"errors"

	"stockade.dev/plugin"
	"stockade.dev/plugin/internal/dispatch"
)

// Running is a started reactor beside a double.
type Running struct {
	host   *Host
	plugin plugin.Plugin
	cursor uint64
}

// handle sends a message the way it takes in the sandbox, as text.
func (r *Running) handle(message plugin.Message) error {
	read, err := plugin.ReadMessage(int(r.host.deliver(message)))
	if err != nil {
		return err
	}
	return dispatch.Handle(r.plugin, read)
}

// Events hands over a batch of events.
func (r *Running) Events(events ...plugin.Event) error { return r.EventsAfterLoss(0, events...) }

// EventsAfterLoss hands over a batch of events before which lost were dropped.
func (r *Running) EventsAfterLoss(lost uint64, events ...plugin.Event) error {
	r.cursor += lost + uint64(len(events))
	return r.handle(&plugin.EventBatch{Cursor: r.cursor, Lost: lost, Events: events})
}

// Call calls method, which begins with the plugin's name and a dot; the reply.
func (r *Running) Call(method string, body []byte) ([]byte, error) {
	if err := r.handle(&plugin.Call{Method: method, Caller: "zmq", Body: body}); err != nil {
		return nil, err
	}
	return r.reply()
}

// Rank asks for an order of candidates; the IDs as the plugin gave them.
func (r *Running) Rank(candidates ...plugin.Candidate) ([]uint32, error) {
	if err := r.handle(&plugin.Rank{Candidates: candidates}); err != nil {
		return nil, err
	}
	reply, err := r.reply()
	if err != nil {
		return nil, err
	}
	var ids []uint32
	return ids, json.Unmarshal(reply, &ids)
}

// Shutdown asks it to end.
func (r *Running) Shutdown() error { return r.handle(&plugin.Shutdown{GraceMs: 5000}) }

func (r *Running) reply() ([]byte, error) {
	reply, ok := r.host.Reply()
	if !ok {
		return nil, errors.New("the plugin gave no reply")
	}
	return reply, nil
}
