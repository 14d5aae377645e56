//go:build !wasip1

package main

import (
	"io"
	"os"
	"sync"
	"time"
)

var stdinEnded = sync.OnceValue(func() <-chan struct{} {
	ended := make(chan struct{})
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		close(ended)
	}()
	return ended
})

// stopRequestedWithin lets the plugin run outside the sandbox too: it sleeps for d, or until
// standard input ends; it tells which.
func stopRequestedWithin(d time.Duration) bool {
	select {
	case <-stdinEnded():
		return true
	case <-time.After(d):
		return false
	}
}
