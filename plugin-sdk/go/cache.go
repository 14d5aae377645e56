package plugin

import (
	"time"

	"stockade.dev/plugin/internal/abi"
)

// CacheStats are counts of the whole cache, or of the plugin's tenant.
type CacheStats struct {
	CapacityBytes   uint64        `json:"capacity_bytes"`   // size of the pool
	UsedBytes       uint64        `json:"used_bytes"`       // bytes in use
	Objects         uint64        `json:"objects"`          // that can be read
	Lookups         uint64        `json:"lookups"`          // since the server started
	LookupTokens    uint64        `json:"lookup_tokens"`    // tokens that were looked up
	HitTokens       uint64        `json:"hit_tokens"`       // tokens of them that were there
	StoredChunks    uint64        `json:"stored_chunks"`    // chunks stored
	RetrievedChunks uint64        `json:"retrieved_chunks"` // chunks retrieved
	EvictedObjects  uint64        `json:"evicted_objects"`  // that made room
	Tenants         []TenantStats `json:"tenants"`          // those that the plugin may see
}

// TenantStats is a tenant's share of the pool.
type TenantStats struct {
	Name       string  `json:"name"`        // as in the server's file
	UsedBytes  uint64  `json:"used_bytes"`  // bytes in use
	FloorBytes uint64  `json:"floor_bytes"` // that nobody else can push it below
	CapBytes   *uint64 `json:"cap_bytes"`   // that it cannot exceed, where it is capped
	Objects    uint64  `json:"objects"`     // that can be read
}

// Stats are the counts now. Needs cache = ["stats"] in the manifest, without which it is Denied.
func Stats() (*CacheStats, error) {
	text, err := answered(abi.CacheStats())
	if err != nil {
		return nil, err
	}
	stats := &CacheStats{}
	return stats, parsed(text, stats, "the statistics")
}

// KeyQuery says which keys to list; the zero value is all of them.
type KeyQuery struct {
	Salt  *string `json:"salt,omitempty"`  // only keys of this salt
	Model string  `json:"model,omitempty"` // only keys of this model
	After string  `json:"after,omitempty"` // go on after this key, Next of the last page
	Limit uint32  `json:"limit,omitempty"` // most keys of the page
}

// KeyPage is a page of keys.
type KeyPage struct {
	Keys []Key   `json:"keys"` // in the order of keys
	Next *string `json:"next"` // where the next page begins, if there is one
}

// Key is an object that can be read.
type Key struct {
	Key    string `json:"key"`     // LMCache's object key, <model>@<kv_rank>@<group>@<hash> and @<salt>
	Bytes  uint64 `json:"bytes"`   // its size
	IdleMs uint64 `json:"idle_ms"` // milliseconds since it was last asked for; 0 too where that is not known
	Pinned bool   `json:"pinned"`  // whether it is pinned
}

// Keys is a page of keys. Needs cache = ["keys"]. It is Invalid for a query that makes no sense.
func Keys(query KeyQuery) (*KeyPage, error) {
	text, err := written(query)
	if err != nil {
		return nil, err
	}
	if text, err = answered(abi.CacheKeys(text)); err != nil {
		return nil, err
	}
	page := &KeyPage{}
	return page, parsed(text, page, "a page of keys")
}

// Outcome is what came of a request for several keys. Another tenant's keys count as denied whether
// they exist or not.
type Outcome struct {
	Done    uint64 `json:"done"`    // keys for which it was done
	Missing uint64 `json:"missing"` // keys that are not in the cache
	Denied  uint64 `json:"denied"`  // keys that are none of the plugin's business
}

func cacheRequest(op string, keys []string, ttl time.Duration) (Outcome, error) {
	if keys == nil {
		keys = []string{}
	}
	text, err := written(struct {
		Op    string   `json:"op"`
		Keys  []string `json:"keys"`
		TTLMs int32    `json:"ttl_ms,omitempty"`
	}{op, keys, milliseconds(ttl)})
	if err != nil {
		return Outcome{}, err
	}
	if text, err = answered(abi.CacheRequest(text)); err != nil {
		return Outcome{}, err
	}
	var outcome Outcome
	return outcome, parsed(text, &outcome, "the outcome of a request")
}

// Pin asks that objects be evicted last, for ttl, at most an hour. Needs cache = ["pin"].
//
// A pin is a hint: it ends with the plugin, and when nothing else is left pinned objects go too.
func Pin(ttl time.Duration, keys ...string) (Outcome, error) { return cacheRequest("pin", keys, ttl) }

// Unpin takes pins of this plugin back. Needs cache = ["pin"].
func Unpin(keys ...string) (Outcome, error) { return cacheRequest("unpin", keys, 0) }

// Evict removes objects that nobody is using. Needs cache = ["evict"].
func Evict(keys ...string) (Outcome, error) { return cacheRequest("evict", keys, 0) }

// Prefetch has objects of the second tier loaded, and waits for that: Done counts those that are in
// memory then. Needs cache = ["prefetch"]. It is Unavailable without a second tier or while its
// storage fails, and Timeout when it takes longer than host_call_seconds; what has come by then
// stays.
func Prefetch(keys ...string) (Outcome, error) { return cacheRequest("prefetch", keys, 0) }

// EventType is a kind of event.
type EventType string

// The kinds of events. Others may come from a newer server.
const (
	Stored     EventType = "stored"      // an object can be read
	Retrieved  EventType = "retrieved"   // an object was read
	Evicted    EventType = "evicted"     // an object is gone
	Lookup     EventType = "lookup"      // a request asked how much of its tokens is there
	SessionEnd EventType = "session_end" // a request has ended
)

// Subscription says what to subscribe to.
type Subscription struct {
	Types    []EventType `json:"types,omitempty"`     // these kinds; all of them where it is empty
	Cursor   *uint64     `json:"cursor"`              // go on after this event; from now on without
	MaxBatch uint32      `json:"max_batch,omitempty"` // most events of a batch
}

// Subscribe subscribes to events, which then come as an [EventBatch]; it returns the number of the
// last event before them. A second call replaces the first. Needs cache = ["events"].
func Subscribe(subscription Subscription) (cursor uint64, err error) {
	text, err := written(subscription)
	if err != nil {
		return 0, err
	}
	if text, err = answered(abi.EventsSubscribe(text)); err != nil {
		return 0, err
	}
	var subscribed struct {
		Cursor uint64 `json:"cursor"`
	}
	err = parsed(text, &subscribed, "the cursor")
	return subscribed.Cursor, err
}
