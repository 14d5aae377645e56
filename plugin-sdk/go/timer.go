package plugin

import (
	"errors"
	"math"
	"time"

	"stockade.dev/plugin/internal/abi"
)

// milliseconds is a time as the contract has it, at most what fits.
func milliseconds(d time.Duration) int32 {
	return int32(min(d.Milliseconds(), math.MaxInt32))
}

// Now is the time by the server's clock, in milliseconds.
func Now() time.Time { return time.UnixMilli(abi.ClockMs()) }

// Once starts a timer that comes once, or replaces the one of that name. It comes as a [Timer].
func Once(name string, after time.Duration) error {
	return done(abi.TimerSet(name, milliseconds(after), 0))
}

// Every starts a timer that comes at once and then again and again, or replaces the one of that
// name. Turns that the plugin is too slow for are left out, not made up for.
func Every(name string, every time.Duration) error { return EveryAfter(name, 0, every) }

// EveryAfter is Every, but the timer comes for the first time after first.
func EveryAfter(name string, first, every time.Duration) error {
	if every < time.Millisecond {
		return &Error{Code: Invalid, Message: "timer `" + name + "`: every must be at least a millisecond"}
	}
	return done(abi.TimerSet(name, milliseconds(first), milliseconds(every)))
}

// CancelTimer ends a timer; it tells whether there was one.
func CancelTimer(name string) (bool, error) {
	err := done(abi.TimerCancel(name))
	if errors.Is(err, NotFound) {
		return false, nil
	}
	return err == nil, err
}
