package plugin

import (
	"fmt"

	"stockade.dev/plugin/internal/abi"
)

// Level says how urgent a line of the log is; the server's --log-level decides what is shown.
type Level int32

// The levels.
const (
	LevelError Level = iota // somebody must do something
	LevelWarn               // something is not as it should be
	LevelInfo               // what a user wants to know
	LevelDebug              // what an author wants to know
	LevelTrace              // everything
)

// Logf logs a line. Lines over the limits of the manifest are dropped and counted by the server;
// there is nothing for a plugin to do about it, so nothing is returned.
func Logf(level Level, format string, args ...any) {
	abi.Log(int32(level), fmt.Sprintf(format, args...))
}

// Errorf logs a line at LevelError.
func Errorf(format string, args ...any) { Logf(LevelError, format, args...) }

// Warnf logs a line at LevelWarn.
func Warnf(format string, args ...any) { Logf(LevelWarn, format, args...) }

// Infof logs a line at LevelInfo.
func Infof(format string, args ...any) { Logf(LevelInfo, format, args...) }

// Debugf logs a line at LevelDebug.
func Debugf(format string, args ...any) { Logf(LevelDebug, format, args...) }

// Tracef logs a line at LevelTrace.
func Tracef(format string, args ...any) { Logf(LevelTrace, format, args...) }
