// Package dispatch gets from the server's calls of exports to the methods of a plugin.
package dispatch

import (
	"errors"
	"fmt"

	"stockade.dev/plugin"
)

// Handle hands a message to the plugin, and the reply of a call or a ranking to the server.
func Handle(p plugin.Plugin, message plugin.Message) error {
	if p == nil {
		return errors.New("no plugin: call reactor.Register in an init function")
	}
	switch message := message.(type) {
	case *plugin.Start:
		return p.Start(message)
	case *plugin.Timer:
		if handler, ok := p.(plugin.TimerHandler); ok {
			return handler.Timer(message)
		}
	case *plugin.EventBatch:
		if handler, ok := p.(plugin.EventHandler); ok {
			return handler.Events(message)
		}
	case *plugin.Shutdown:
		if handler, ok := p.(plugin.ShutdownHandler); ok {
			return handler.Shutdown(message)
		}
	case *plugin.Call:
		handler, ok := p.(plugin.Callable)
		if !ok {
			return fmt.Errorf("%T has no method Call", p)
		}
		reply, err := handler.Call(message)
		if err != nil {
			return err
		}
		return plugin.Reply(reply)
	case *plugin.Rank:
		handler, ok := p.(plugin.Ranker)
		if !ok {
			return fmt.Errorf("%T has no method Rank", p)
		}
		order, err := handler.Rank(message)
		if err != nil {
			return err
		}
		return plugin.ReplyOrder(order)
	}
	return nil
}

// Run reads the message of length bytes, handles it and logs what goes wrong; the result for the server.
func Run(p plugin.Plugin, length int32) int32 {
	message, err := plugin.ReadMessage(int(length))
	if err == nil {
		err = Handle(p, message)
	}
	if err != nil {
		plugin.Errorf("%v", err)
		return 1
	}
	return 0
}
