/// Half-precision numbers as bits. (`Float16` is not there on Macs with Intel processors.)
package enum Half {
    /// The nearest half-precision number; of two that are as near, the even one.
    package static func bits(_ value: Float) -> UInt16 {
        let bits = value.bitPattern
        let sign = UInt16(truncatingIfNeeded: bits >> 16) & 0x8000
        let magnitude = bits & 0x7FFF_FFFF
        if magnitude > 0x7F80_0000 { return sign | 0x7E00 }  // not a number
        if magnitude >= 0x477F_F000 { return sign | 0x7C00 }  // rounds to infinity
        if magnitude < 0x3880_0000 {  // below the smallest normal number: a multiple of 2^-24
            let multiple = Float(bitPattern: magnitude) * 0x1p24
            return sign | UInt16(multiple.rounded(.toNearestOrEven))
        }
        let rounded = magnitude + 0xFFF + (magnitude >> 13 & 1) - 0x3800_0000
        return sign | UInt16(truncatingIfNeeded: rounded >> 13)
    }

    package static func float(_ bits: UInt16) -> Float {
        let sign = UInt32(bits & 0x8000) << 16
        let magnitude = UInt32(bits & 0x7FFF)
        if magnitude < 0x400 {
            let value = Float(magnitude) * 0x1p-24
            return sign == 0 ? value : -value
        }
        let exponentShift: UInt32 = magnitude >= 0x7C00 ? 0x7000_0000 : 0x3800_0000
        return Float(bitPattern: sign | (magnitude << 13 + exponentShift))
    }

    package static func rounded(_ value: Float) -> Float {
        float(bits(value))
    }
}
