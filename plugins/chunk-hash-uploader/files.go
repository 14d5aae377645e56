package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strings"
	"time"
)

const (
	prefix  = "lookup_hashes_"
	suffix  = ".jsonl"
	archive = "archive"
)

// logs are the names of the lookup-hash logs in a directory, oldest first: names begin with the time.
func logs(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, entry := range entries {
		name := entry.Name()
		// The server follows no link here, so neither does the plugin.
		if entry.Type().IsRegular() && strings.HasPrefix(name, prefix) && strings.HasSuffix(name, suffix) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names, nil
}

// whole are the logs that the server does not write any more: all but the newest, and that too when it
// has not changed for newestAge, where that is not 0.
func whole(dir string, now time.Time, newestAge time.Duration) ([]string, error) {
	names, err := logs(dir)
	if err != nil || len(names) == 0 {
		return nil, err
	}
	last := len(names) - 1
	if newestAge > 0 {
		info, err := os.Stat(path.Join(dir, names[last]))
		if err == nil && now.Sub(info.ModTime()) > newestAge {
			return names, nil
		}
	}
	return names[:last], nil
}

// upload is a file that is being sent.
type upload struct {
	name   string
	offset int64
	pieces int
}

// piece is what becomes one object.
type piece struct {
	name   string
	lines  []byte
	isLast bool
}

// smallReads reads little at a time: what one call into the sandbox may carry has a limit below a piece.
type smallReads struct{ file *os.File }

func (r smallReads) Read(into []byte) (int, error) { return r.file.Read(into[:min(len(into), 64<<10)]) }

// next reads the next piece: whole lines of at most size bytes, or one longer line as it is.
func (u *upload) next(dir string, size int) (*piece, error) {
	file, err := os.Open(path.Join(dir, u.name))
	if err != nil {
		return nil, err
	}
	defer file.Close()
	if _, err := file.Seek(u.offset, io.SeekStart); err != nil {
		return nil, err
	}
	lines := make([]byte, size)
	n, err := io.ReadFull(smallReads{file}, lines)
	lines = lines[:n]
	isLast := errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
	if err != nil && !isLast {
		return nil, err
	}
	if !isLast {
		// One more byte tells whether the piece is the end by chance.
		_, err := file.Read(make([]byte, 1))
		isLast = errors.Is(err, io.EOF)
	}
	if !isLast {
		end := bytes.LastIndexByte(lines, '\n') + 1
		if end == 0 {
			return nil, fmt.Errorf("%s has a line of more than %d bytes: raise chunk_hash_uploader.piece_kib", u.name, size)
		}
		lines = lines[:end]
	}
	name := u.name
	if !isLast || u.pieces > 0 {
		name = fmt.Sprintf("%s.%06d%s", strings.TrimSuffix(u.name, suffix), u.pieces, suffix)
	}
	u.offset += int64(len(lines))
	u.pieces++
	return &piece{name, lines, isLast}, nil
}

// putAway moves a file into the archive and removes the oldest ones there beyond keep.
func putAway(dir, name string, keep int) error {
	if err := os.Rename(path.Join(dir, name), path.Join(dir, archive, name)); err != nil {
		return err
	}
	names, err := logs(path.Join(dir, archive))
	if err != nil {
		return err
	}
	for _, name := range names[:max(len(names)-keep, 0)] {
		if err := os.Remove(path.Join(dir, archive, name)); err != nil {
			return err
		}
	}
	return nil
}
