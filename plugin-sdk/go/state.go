package plugin

import (
	"encoding/json"
	"errors"

	"stockade.dev/plugin/internal/abi"
)

// GetState is the value of a key of the plugin's own state, which survives its restarts, and whether
// there is one. State needs state_kib above 0 in the manifest's [limits]; keys and values together count.
func GetState(key string) (value []byte, ok bool, err error) {
	value, err = answered(abi.StateGet(key))
	if errors.Is(err, NotFound) {
		return nil, false, nil
	}
	return value, err == nil, err
}

// SetState sets the value of a key. It is Limit when state_kib would be exceeded.
func SetState(key string, value []byte) error { return done(abi.StateSet(key, value)) }

// DeleteState removes a key; it tells whether it was there.
func DeleteState(key string) (bool, error) {
	err := done(abi.StateDelete(key))
	if errors.Is(err, NotFound) {
		return false, nil
	}
	return err == nil, err
}

// StateKeys are the keys that begin with prefix, in order.
func StateKeys(prefix string) ([]string, error) {
	text, err := answered(abi.StateKeys(prefix))
	if err != nil {
		return nil, err
	}
	var keys []string
	return keys, parsed(text, &keys, "the list of keys")
}

// GetStateJSON reads the value of a key that SetStateJSON kept; it tells whether there is one.
func GetStateJSON(key string, into any) (bool, error) {
	value, ok, err := GetState(key)
	if err != nil || !ok {
		return false, err
	}
	if err := json.Unmarshal(value, into); err != nil {
		return false, &Error{Code: Invalid, Message: "state `" + key + "` is not what is asked for: " + err.Error()}
	}
	return true, nil
}

// SetStateJSON sets the value of a key, as JSON.
func SetStateJSON(key string, value any) error {
	text, err := written(value)
	if err != nil {
		return err
	}
	return SetState(key, text)
}
