package main

import (
	"crypto/sha256"
	"fmt"
	"sort"
	"strings"

	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// render prints every populated field of a message in field order, so that two answers are equal exactly when their texts are.
//
// In a response header the ids and the raft term are shown only as "set": two clusters never agree on them. Unknown fields are
// shown too: a field that the reference does not have is a difference.
func render(message proto.Message) string {
	var out strings.Builder
	renderMessage(&out, message.ProtoReflect())
	return out.String()
}

func renderMessage(out *strings.Builder, message protoreflect.Message) {
	header := message.Descriptor().FullName() == "etcdserverpb.ResponseHeader"
	var fields []protoreflect.FieldDescriptor
	message.Range(func(field protoreflect.FieldDescriptor, _ protoreflect.Value) bool {
		fields = append(fields, field)
		return true
	})
	sort.Slice(fields, func(i, j int) bool { return fields[i].Number() < fields[j].Number() })
	out.WriteByte('{')
	for i, field := range fields {
		if i > 0 {
			out.WriteByte(' ')
		}
		out.WriteString(string(field.Name()))
		out.WriteByte('=')
		if header && field.Name() != "revision" {
			out.WriteString("set")
			continue
		}
		renderField(out, field, message.Get(field))
	}
	if unknown := message.GetUnknown(); len(unknown) > 0 {
		fmt.Fprintf(out, " unknown=%x", []byte(unknown))
	}
	out.WriteByte('}')
}

func renderField(out *strings.Builder, field protoreflect.FieldDescriptor, value protoreflect.Value) {
	if !field.IsList() {
		renderValue(out, field, value)
		return
	}
	out.WriteByte('[')
	for i := range value.List().Len() {
		if i > 0 {
			out.WriteByte(' ')
		}
		renderValue(out, field, value.List().Get(i))
	}
	out.WriteByte(']')
}

func renderValue(out *strings.Builder, field protoreflect.FieldDescriptor, value protoreflect.Value) {
	switch field.Kind() {
	case protoreflect.MessageKind, protoreflect.GroupKind:
		renderMessage(out, value.Message())
	case protoreflect.BytesKind:
		out.WriteString(shortBytes(value.Bytes()))
	case protoreflect.StringKind:
		fmt.Fprintf(out, "%q", value.String())
	default:
		fmt.Fprintf(out, "%v", value.Interface())
	}
}

func shortBytes(value []byte) string {
	if len(value) <= 96 {
		return fmt.Sprintf("%q", value)
	}
	return fmt.Sprintf("%q..(%d bytes, sha256 %x)", value[:16], len(value), sha256.Sum256(value))
}

// renderError prints code, text and details of a gRPC error.
func renderError(err error) string {
	state := status.Convert(err)
	text := fmt.Sprintf("error %s %q", state.Code(), state.Message())
	for _, detail := range state.Proto().GetDetails() {
		text += " detail " + render(detail)
	}
	return text
}

// answer renders whichever of the two a unary call gave.
func answer(message proto.Message, err error) string {
	if err != nil {
		return renderError(err)
	}
	return render(message)
}
