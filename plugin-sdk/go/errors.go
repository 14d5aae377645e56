package plugin

import (
	"encoding/json"
	"fmt"

	"stockade.dev/plugin/internal/abi"
)

// ErrorCode is a kind of refusal of the contract. It is an error, so that
// errors.Is(err, plugin.NotFound) asks for one.
type ErrorCode int32

// The kinds of refusals. Another number is one that this version of the module does not know; 0 is
// an answer that it cannot read.
const (
	Denied      ErrorCode = -1 // the manifest or the server's file does not grant it
	Invalid     ErrorCode = -2 // an argument is not what the contract says
	NotFound    ErrorCode = -3 // there is no such key, timer or object
	Limit       ErrorCode = -4 // one of the plugin's own limits is used up
	Timeout     ErrorCode = -5 // it took longer than it may
	Unavailable ErrorCode = -6 // the other side could not be reached, or there is none
	State       ErrorCode = -7 // the call makes no sense now
)

func (c ErrorCode) Error() string {
	names := map[ErrorCode]string{
		Denied: "denied", Invalid: "invalid", NotFound: "not found", Limit: "limit",
		Timeout: "timeout", Unavailable: "unavailable", State: "state",
	}
	if name, ok := names[c]; ok {
		return name
	}
	return fmt.Sprintf("code %d", int32(c))
}

// Error is a call that did not succeed.
type Error struct {
	// Code is the kind.
	Code ErrorCode
	// Message is the server's sentence for the author. For Denied it names the line to add to the manifest.
	Message string
}

func (e *Error) Error() string {
	if e.Message == "" {
		return "the server refused the call: " + e.Code.Error()
	}
	return e.Message
}

// Unwrap gives the code, for errors.Is.
func (e *Error) Unwrap() error { return e.Code }

// length is the number that a call came back with, where it is none of an error.
func length(result int32) (int, error) {
	if result >= 0 {
		return int(result), nil
	}
	return 0, &Error{Code: ErrorCode(result), Message: string(abi.Answer(int(abi.AnswerLength())))}
}

// done is the result of a call that has no answer.
func done(result int32) error {
	_, err := length(result)
	return err
}

// answered is the result of a call that answers: the bytes of it.
func answered(result int32) ([]byte, error) {
	n, err := length(result)
	if err != nil {
		return nil, err
	}
	return abi.Answer(n), nil
}

// parsed reads JSON of the server.
func parsed(text []byte, into any, what string) error {
	if err := json.Unmarshal(text, into); err != nil {
		return &Error{Message: what + " of the server is not what this module knows: " + err.Error()}
	}
	return nil
}

// written writes JSON for the server.
func written(value any) ([]byte, error) {
	text, err := json.Marshal(value)
	if err != nil {
		return nil, &Error{Code: Invalid, Message: "it cannot be JSON: " + err.Error()}
	}
	return text, nil
}
