package main

import (
	"os"
	"structs"
	"time"
)

// Preview 1's poll_oneoff is the one call that waits for a time and for standard input at once. Go's
// own way, a goroutine that reads os.Stdin, would block every goroutine of the program until there is
// input. The structs follow preview 1's witx description.

const (
	clockMonotonic  = 1
	eventClock      = 0
	eventFdRead     = 1
	userdataClock   = 1
	userdataStdin   = 2
	errnoSuccess    = 0
	stdinDescriptor = 0
)

type subscription struct {
	_         structs.HostLayout
	userdata  uint64
	kind      uint8
	_         [7]byte
	target    uint32 // clock id or file descriptor
	_         [4]byte
	timeout   uint64 // nanoseconds, clocks only
	precision uint64
	flags     uint16
	_         [6]byte
}

type event struct {
	_        structs.HostLayout
	userdata uint64
	errno    uint16
	kind     uint8
	_        [5]byte
	bytes    uint64
	flags    uint16
	_        [6]byte
}

//go:wasmimport wasi_snapshot_preview1 poll_oneoff
func pollOneoff(in *[2]subscription, out *[2]event, count uint32, ready *uint32) uint32

// stopRequestedWithin sleeps for d, or until the server asks to stop; it tells whether it did.
// No other goroutine runs meanwhile.
func stopRequestedWithin(d time.Duration) bool {
	until := time.Now().Add(d)
	for {
		left := max(time.Until(until), 0)
		in := [2]subscription{
			{userdata: userdataClock, kind: eventClock, target: clockMonotonic, timeout: uint64(left)},
			{userdata: userdataStdin, kind: eventFdRead, target: stdinDescriptor},
		}
		var out [2]event
		var ready uint32
		if pollOneoff(&in, &out, uint32(len(in)), &ready) != errnoSuccess {
			// No way to wait for input here: sleep, and be ended by the server when it must.
			time.Sleep(left)
			return false
		}
		elapsed := false
		for _, e := range out[:min(int(ready), len(out))] {
			switch e.userdata {
			case userdataClock:
				elapsed = true
			case userdataStdin:
				// Whatever is written to us means nothing; only the end does.
				if _, err := os.Stdin.Read(make([]byte, 256)); err != nil {
					return true
				}
			}
		}
		if elapsed {
			return false
		}
	}
}
