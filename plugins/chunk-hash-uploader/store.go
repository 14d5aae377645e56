package main

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/url"
	"strings"
	"time"

	"stockade.dev/plugin"
)

// store is where objects go: PUTs below a URL, signed for S3 where there are credentials.
type store struct {
	base   *url.URL
	region string
	key    string // empty for requests that are not signed
	secret string
	token  string
}

// newStore checks a URL such as https://s3.example.com/bucket/prefix and takes credentials from getenv.
func newStore(base, region string, getenv func(string) string) (store, error) {
	parsed, err := url.Parse(base)
	if err != nil || (parsed.Scheme != "http" && parsed.Scheme != "https") || parsed.Host == "" ||
		parsed.User != nil || parsed.RawQuery != "" || parsed.Fragment != "" {
		return store{}, fmt.Errorf("setting chunk_hash_uploader.url is %q: give https://host/bucket/prefix", base)
	}
	s := store{base: parsed, region: region, key: getenv("AWS_ACCESS_KEY_ID"),
		secret: getenv("AWS_SECRET_ACCESS_KEY"), token: getenv("AWS_SESSION_TOKEN")}
	if (s.key == "") != (s.secret == "") {
		return store{}, fmt.Errorf("AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY belong together: grant and set both, or neither")
	}
	return s, nil
}

func (s store) String() string {
	if s.key == "" {
		return s.base.String() + ", not signed"
	}
	return s.base.String() + ", signed for " + s.region
}

// put stores an object; storing it again replaces it.
func (s store) put(name string, body []byte, now time.Time) error {
	target := s.base.JoinPath(name)
	request := &plugin.HTTPRequest{
		Method: "PUT", URL: target.String(), Body: body,
		Headers: map[string]string{"content-type": "application/x-ndjson"},
	}
	if s.key != "" {
		s.sign(request, target, now)
	}
	response, err := request.Send()
	if err != nil {
		return err
	}
	if response.IsSuccess() {
		return nil
	}
	reason, err := response.Body()
	if err != nil {
		reason = nil
	}
	return fmt.Errorf("the store answered %d: %.300s", response.Status, strings.Join(strings.Fields(string(reason)), " "))
}

// sign adds the headers of AWS Signature Version 4.
func (s store) sign(request *plugin.HTTPRequest, target *url.URL, now time.Time) {
	stamp := now.UTC().Format("20060102T150405Z")
	day := stamp[:8]
	payload := hexDigest(request.Body)
	request.Headers["x-amz-date"] = stamp
	request.Headers["x-amz-content-sha256"] = payload
	signed := [][2]string{
		{"content-type", request.Headers["content-type"]},
		{"host", canonicalHost(target)},
		{"x-amz-content-sha256", payload},
		{"x-amz-date", stamp},
	}
	if s.token != "" {
		request.Headers["x-amz-security-token"] = s.token
		signed = append(signed, [2]string{"x-amz-security-token", s.token})
	}
	var headers, names strings.Builder
	for i, header := range signed {
		fmt.Fprintf(&headers, "%s:%s\n", header[0], header[1])
		if i > 0 {
			names.WriteByte(';')
		}
		names.WriteString(header[0])
	}
	canonical := strings.Join([]string{
		request.Method, target.EscapedPath(), "", headers.String(), names.String(), payload,
	}, "\n")
	scope := day + "/" + s.region + "/s3/aws4_request"
	toSign := strings.Join([]string{"AWS4-HMAC-SHA256", stamp, scope, hexDigest([]byte(canonical))}, "\n")
	key := []byte("AWS4" + s.secret)
	for _, part := range []string{day, s.region, "s3", "aws4_request", toSign} {
		mac := hmac.New(sha256.New, key)
		mac.Write([]byte(part))
		key = mac.Sum(nil)
	}
	request.Headers["authorization"] = fmt.Sprintf("AWS4-HMAC-SHA256 Credential=%s/%s, SignedHeaders=%s, Signature=%s",
		s.key, scope, names.String(), hex.EncodeToString(key))
}

// canonicalHost is the Host header that the server sends: the port only where it is not the scheme's.
func canonicalHost(target *url.URL) string {
	host := strings.ToLower(target.Host)
	switch target.Scheme {
	case "http":
		host = strings.TrimSuffix(host, ":80")
	case "https":
		host = strings.TrimSuffix(host, ":443")
	}
	return host
}

func hexDigest(bytes []byte) string {
	digest := sha256.Sum256(bytes)
	return hex.EncodeToString(digest[:])
}
